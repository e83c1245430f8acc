"""Speed and memory of a training step against mlx-lm and PyTorch + PEFT, as ratios within one run."""
