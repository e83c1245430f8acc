"""Fine-tune language models on Apple Silicon with MLX."""

from mlxlora.version import __version__

__all__ = ["__version__"]
