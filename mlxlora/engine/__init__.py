"""How a language model is steered for training: backbone and head, chunked loss, linear-memory attention, recompute."""
