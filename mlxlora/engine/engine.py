"""The engine: value and gradient of an objective for one batch, as fast and as small as the model allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxlora.data.sample import Batch
from mlxlora.engine.account import Account, account
from mlxlora.engine.anatomy import Anatomy, dissect, relative_error
from mlxlora.engine.chain import Chain
from mlxlora.engine.config import CheckpointBlocks, EngineConfig, Grade
from mlxlora.engine.ends import NotAChain
from mlxlora.engine.frozen import pays
from mlxlora.engine.general import General
from mlxlora.engine.masks import Layout, Steering, counting, layout_of, unseeing
from mlxlora.engine.packing import end_to_end, packing_refusal
from mlxlora.engine.precision import beyond_rounding, tolerance
from mlxlora.engine.scores import Metrics, Objective, Outcome
from mlxlora.engine.verify import disagreement, likelihood, small_batch
from mlxlora.errors import ConfigError, UnsupportedError
from mlxlora.files import human_bytes
from mlxlora.parameters import flat


class Engine:
    """Computes steps for one network.

    The network is one of mlx-lm's, with or without adapters in it; it stays as it is. What is trainable is looked up
    once, here: make an engine after adapters were put in or taken out.

        engine = Engine(network)
        total, count, metrics, grads = engine.value_and_grad(sft, batch)

    Attributes:
        notes: what had to be computed in a slower or larger way for this model, and why
        keeps_squares: whether some layer keeps tokens × tokens, so that memory grows with the square of a row's length
        frozen_kept: the share of what frozen blocks make of the texts that is computed once; see `keep_frozen`
    """

    def __init__(self, network: nn.Module, config: EngineConfig | None = None) -> None:
        self.network = network
        self.config = config or EngineConfig()
        self.notes: list[str] = []
        self._anatomy = dissect(network, self.notes)
        self._steering = Steering(network)
        self.keeps_squares = False
        self.frozen_kept = 0.0
        self._linear = self._attention_is_linear()
        self._refusal: str | None = None
        self._asked_to_pack = False
        self._general: General | None = None
        self._chain = self._verified_chain()
        all_kept = self.config.checkpoint_blocks == "none"
        self._recomputes = self._chain is None and not all_kept and self._blocks_recompute()
        self._refuse(self.config.checkpoint_blocks)

    def value_and_grad(
        self, objective: Objective, batch: Batch, key: mx.array | None = None
    ) -> tuple[mx.array, mx.array, Metrics, Any]:
        """`(sum, count, metrics, gradients of the sum)` of `objective` for `batch`.

        The gradients form a tree like `network.trainable_parameters()`. `key` is the randomness of dropout; without one
        there is no dropout. Nothing is waited for: the arrays may still be on their way.
        """
        outcome, grads = self._run(objective, batch, key, gradients=True)
        return *outcome, tree_unflatten([(path, grads[path]) for path in flat(self.network.trainable_parameters())])

    def evaluate(self, objective: Objective, batch: Batch) -> tuple[mx.array, mx.array, Metrics]:
        """`(sum, count, metrics)` of `objective` for `batch`, without gradients and without dropout."""
        return self._run(objective, batch, None, gradients=False)[0]

    def _run(
        self, objective: Objective, batch: Batch, key: mx.array | None, gradients: bool
    ) -> tuple[Outcome, dict[str, mx.array]]:
        batch = self._laid(batch)
        layout = self._layout(batch)
        if self._chain is not None:
            return self._chain.run(objective, batch, layout, key, gradients, self._kept(len(self._chain.blocks)))
        return self._whole().run(objective, batch, layout, key, gradients)

    def _whole(self) -> General:
        if self._general is None:
            recompute = self.config.checkpoint_blocks != "none" and self._recomputes
            compiled = self.config.compiles
            self._general = General(self._anatomy, self._steering, self.config.loss_chunk, recompute, compiled)
        return self._general

    def _blocks_recompute(self) -> bool:
        """Whether blocks give in a second run what they gave in the first; the reason goes to the notes if not."""
        batch, steps = small_batch(self._anatomy), []
        for recompute in (False, True):
            way = General(self._anatomy, self._steering, self.config.loss_chunk, recompute, compiled=False)
            try:
                steps.append(way.run(likelihood, batch, Layout(self._linear), None, gradients=True))
            except (ValueError, TypeError, AttributeError, IndexError, KeyError):
                break
        if len(steps) == 2 and disagreement(steps[1], steps[0]) <= tolerance(self._anatomy.dtype):
            return True
        self.notes.append("everything is kept for the backward pass: its blocks do not give the same when run again")
        return False

    def _kept(self, blocks: int) -> int:
        """Of how many of so many blocks the products are kept."""
        kept = self.config.checkpoint_blocks
        if isinstance(kept, int):
            return kept
        return 1 if kept == "inputs" else blocks

    @property
    def grades(self) -> tuple[Grade, ...]:
        """What of this model's blocks may be kept, where that is open: the fastest first."""
        if self._chain is not None:
            return "products", "inputs"
        return ("none", "inputs") if self._recomputes else ("none",)

    def _refuse(self, kept: CheckpointBlocks) -> None:
        """Raise where this model has not so many blocks."""
        if isinstance(kept, int) and kept > len(self._anatomy.blocks):
            raise ConfigError(
                f"checkpoint_blocks: the products of the upper {kept} blocks were asked for; this model has "
                f"{len(self._anatomy.blocks)}."
            )

    @property
    def learning_blocks(self) -> int:
        """How many blocks have a backward pass of their own; 0 where a step is one graph."""
        return 0 if self._chain is None else len(self._chain.blocks) - self._chain.lowest

    def _verified_chain(self) -> Chain | None:
        """The block-by-block way, if a small batch shows that it gives what the general way gives."""
        if self._anatomy.backbone is None or self.config.checkpoint_blocks == "none":
            return None
        try:
            chain = Chain(self._anatomy, self._steering, self.config.loss_chunk, compiled=False)
            chain.verify(Layout(self._linear), self._kept(len(chain.blocks)))
        except NotAChain as reason:
            self.notes.append(f"the step is computed as one graph, whose blocks keep all or their inputs: {reason}")
            return None
        chain.compiled = self.config.compiles
        if self.config.wait:
            chain.send = mx.eval
        return chain

    def keep_frozen(self, tokens: int, epochs: float, limit: int, directory: Path | None = None) -> str | None:
        """Compute once for each text what the blocks below the first that learns make of it, where that pays.

        tokens:    of all texts
        epochs:    how often each will be seen
        limit:     bytes that may be kept, in a file in `directory` or else in memory
        Returns what a person should know of it; None where it does not pay, and everything stays as it was.
        """
        size = tokens * self._anatomy.width * self._anatomy.dtype.size
        share = min(1.0, limit / max(size, 1))
        if self._chain is None or not self._chain.frozen or not pays(epochs, share):
            return None
        self.frozen_kept = share
        self._chain.keep_frozen(limit, directory, self._linear, self.config.attention_chunk)
        where = "in memory" if directory is None else "on disk"
        return (
            f"the lower {self._chain.frozen} of {len(self._chain.blocks)} blocks learn nothing: what they make of a "
            f"sample is computed once and kept {where} ({human_bytes(min(size, limit))})"
        )

    def account(
        self, objective: Objective, batch: Batch, key: mx.array | None = None, *, gradients: bool = True
    ) -> Account | None:
        """What `value_and_grad` (without `gradients`: `evaluate`) takes for such a batch, from steps over a few blocks.

        None where a step is one graph.
        """
        if self._chain is None:
            return None
        batch = self._laid(batch)
        kept = self._kept(len(self._chain.blocks))
        return account(self._chain, kept, objective, batch, self._layout(batch), key, gradients)

    def use(self, checkpoint_blocks: CheckpointBlocks, loss_chunk: int) -> None:
        """Keep this much of each block from now on, and make the logits of so many tokens at a time (0: by shape)."""
        self._refuse(checkpoint_blocks)
        self.config = replace(self.config, checkpoint_blocks=checkpoint_blocks, loss_chunk=loss_chunk)
        if self._chain is not None:
            self._chain.ends.head.chunk = loss_chunk
        if self._general is not None:
            self._general.close()
            self._general = None

    def close(self) -> None:
        """Let go of the network and of all that was compiled for it."""
        for way in (self._chain, self._general):
            if way is not None:
                way.close()
        self._chain = self._general = None

    @property
    def leaves_out_padding(self) -> bool:
        """Whether padded rows are laid end to end, where that leaves out enough (see `packing.end_to_end`)."""
        return self._linear and self._refusal_to_pack() is None

    def _laid(self, batch: Batch) -> Batch:
        """The batch as it is computed."""
        if batch.segments is None and self.leaves_out_padding:
            return end_to_end(batch, traced=self.config.compiles)
        return batch

    def _layout(self, batch: Batch) -> Layout:
        reason = None if batch.segments is None else self._refusal_to_pack()
        if reason is not None:
            raise UnsupportedError(f"This model cannot train on packed rows: {reason}. Set samples.packing to false.")
        return layout_of(
            batch.segments, linear=self._linear, chunk=self.config.attention_chunk, traced=self.config.compiles
        )

    def _refusal_to_pack(self) -> str | None:
        if not self._asked_to_pack:
            self._refusal, self._asked_to_pack = packing_refusal(self.network), True
        return self._refusal

    def _attention_is_linear(self) -> bool:
        """Whether attention in linear memory gives the model's own hidden states; what it does not reach goes to the
        notes."""
        if self.config.attention == "plain":
            self.keeps_squares = True
            return False
        tokens = mx.arange(2 * 40).reshape(2, 40) % self._anatomy.vocabulary
        if _sees_without_attention(self._anatomy, self._steering):
            self.notes.append(
                "tokens see each other by more than attention of the usual kind (a state, a convolution): that is "
                "computed and kept as mlx-lm has it"
            )
        with counting() as census, self._steering.with_layout(Layout(linear=False)):
            self._anatomy.network(tokens)
        reason = _why_not_linear(self._anatomy, self._steering, tokens)
        if isinstance(reason, int):
            if reason < census.all:
                left = f"{census.all - reason} of {census.all} layers"
                self.notes.append(f"attention keeps tokens × tokens in {left}")
            self.keeps_squares = reason < census.all
            return True
        if self.config.attention == "linear":
            raise UnsupportedError(f"Attention in linear memory was asked for, but {reason}. Set attention to auto.")
        self.keeps_squares = census.all > 0
        if self.keeps_squares:
            self.notes.append(f"attention keeps tokens × tokens for each head: {reason}")
        return False


def _why_not_linear(anatomy: Anatomy, steering: Steering, tokens: mx.array) -> str | int:
    """How many calls of attention for `tokens` are in linear memory, if that gives what the model's own gives; else why
    not."""
    if not steering.asks:
        return "the model makes its masks itself, or has no attention of the usual kind"
    linear = 0

    def compare() -> float:
        nonlocal linear
        with steering.with_layout(Layout(linear=False)):
            expected = anatomy.network(tokens)
        with counting() as census, steering.with_layout(Layout(linear=True, chunk=16)):
            found = anatomy.network(tokens)
        linear = census.linear
        return relative_error(found, expected)

    try:
        error = beyond_rounding(anatomy.network, anatomy.dtype, compare)
    except (ValueError, TypeError, AttributeError, IndexError) as failure:
        return f"the model looks into its masks ({failure})"
    if error is not None:
        return f"its result differs from the model's by {error:.1e}"
    return linear or "the model's attention is of another kind"


def _sees_without_attention(anatomy: Anatomy, steering: Steering) -> bool:
    """Whether a token's logits depend on the token before it where attention of the usual kind gives nothing."""
    tokens = mx.array([[1, 2, 3, 4], [0, 2, 3, 4]]) % anatomy.vocabulary
    for linear in (True, False):  # a model that looks into its masks takes arrays alone
        try:
            with unseeing(), steering.with_layout(Layout(linear)):
                found = anatomy.network(tokens)[:, 1:]
        except (ValueError, TypeError, AttributeError, IndexError):
            continue
        return relative_error(found[:1], found[1:]) > tolerance(found.dtype)
    return False
