"""What of the engine can be set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mlxlora.engine.device import on_cpu
from mlxlora.errors import ConfigError, nearest

Grade = Literal["auto", "none", "products", "inputs"]
CheckpointBlocks = int | Grade
Compile = Literal["auto", "always", "never"]
Attention = Literal["auto", "linear", "plain"]


@dataclass(frozen=True)
class EngineConfig:
    """How the step computes. No setting changes what is computed, only its speed and its memory.

    Attributes:
        checkpoint_blocks: what is kept of each block for the backward pass: everything (none: fastest to start,
            largest),
            its matrix products (products: nothing dear is computed twice), or only its input (inputs: smallest, one
            more forward pass). A number: the products of so many upper blocks, the inputs of those below. auto takes
            the products while they fit
        loss_chunk: tokens whose logits exist at a time; 0 chooses by the size of the vocabulary
        attention: linear keeps nothing of size tokens × tokens, and is an error where a model does not allow it;
            plain is
            the model's own; auto is linear where it holds
        attention_chunk: queries that attend at a time; 0 chooses by shape
        compile: compile with `mx.compile`; auto does, but not on a CPU, where a compiled graph takes more memory and
            no less time
        wait: send the device one block at a time and wait for it, so that nothing else that wants the device (a
            desktop, say) stands behind a whole step; a model whose step is one graph has no such slices
    """

    checkpoint_blocks: CheckpointBlocks = "auto"
    loss_chunk: int = 0
    attention: Attention = "auto"
    attention_chunk: int = 0
    compile: Compile = "auto"
    wait: bool = False

    @property
    def compiles(self) -> bool:
        """Whether the step is compiled on the device in use."""
        return self.compile == "always" or (self.compile == "auto" and not on_cpu())

    def __post_init__(self) -> None:
        kept = self.checkpoint_blocks
        if isinstance(kept, int) and (isinstance(kept, bool) or kept < 1):
            raise ConfigError(f"checkpoint_blocks is {kept!r}; as a number it says of how many blocks, so 1 or more.")
        for name, choices in (
            ("checkpoint_blocks", (*get_args(Grade), kept) if isinstance(kept, int) else get_args(Grade)),
            ("attention", get_args(Attention)),
            ("compile", get_args(Compile)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"{name} is {value!r}; it is one of {', '.join(choices)}.{nearest(str(value), choices)}"
                )
        for name in ("loss_chunk", "attention_chunk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} is {value!r}; it is a number of tokens, or 0 to choose by shape")
