"""PyTorch + PEFT on the same weights, adapters and batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.scenarios import RANK, Arrays, LeftOut, Scenario, config, network, padded, samples
from mlxlora.parameters import flat


class TorchPeft:
    """transformers' model under PEFT's LoRA, loss of the weighted tokens, float32; with or without checkpointing."""

    def __init__(self, scenario: Scenario, checkpoint: bool, dtype: mx.Dtype) -> None:
        if mx.default_device().type != mx.cpu or dtype != mx.float32:
            raise LeftOut("left out: it is compared on a CPU in float32 alone")
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM

        self._torch = torch
        ours = flat(network(scenario).parameters())
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config(scenario)), attn_implementation="sdpa")
        weights = {
            name.replace(".linear.weight", ".weight"): torch.from_numpy(np.array(array).copy())
            for name, array in ours.items()
            if "lora_" not in name
        }
        model.load_state_dict(weights, strict=False)
        adapted = sorted({name.split(".")[-2] for name in ours if name.endswith("lora_a")})
        layers = range(scenario.layers)[-scenario.last :] if scenario.last else None
        settings: Any = {"target_modules": adapted, "layers_to_transform": None if layers is None else list(layers)}
        peft: Any = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, **settings))
        state = {}
        for name, array in ours.items():
            for short, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                if name.endswith(short):
                    path = f"base_model.model.{name.removesuffix(short)}{theirs}.default.weight"
                    state[path] = torch.from_numpy(np.array(array).T.copy())
        peft.load_state_dict(state, strict=False)
        self._model = peft.train()
        if checkpoint:
            model.activation_checkpointing_enable({"use_reentrant": False})
            # As it comes, it also asks for the gradient of the embeddings, hence of all frozen blocks below an adapter.
            # Only the reentrant way needs that; without, the last quarter takes half the time.
            model.disable_input_require_grads()
        batch = padded(samples(scenario))
        self._tokens = torch.from_numpy(np.array(batch.tokens)).long()
        self._places = torch.from_numpy(np.array(batch.loss_positions)).long()
        self._targets = torch.from_numpy(np.array(batch.targets)).long()

    def _run(self) -> float:
        self._model.zero_grad(set_to_none=True)
        logits = self._model(input_ids=self._tokens, use_cache=False).logits
        labels = self._torch.full((self._tokens.numel(),), -100, dtype=self._torch.long)
        labels[self._places] = self._targets
        loss = self._torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")
        loss.backward()
        return float(loss.item()) / len(self._targets)

    def answer(self) -> tuple[float, Arrays]:
        loss = self._run()
        grads: Arrays = {}
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                path = name.removeprefix("base_model.model.").replace(".default.weight", "")
                path = path.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
                grads[path] = parameter.grad.numpy().T
        return loss, grads

    def step(self) -> float:
        self._run()
        return float(self._targets.numel())

    @cached_property
    def peak(self) -> int:
        """Bytes above the weights that a step takes: one by itself, for counting slows it."""
        self._model.zero_grad(set_to_none=True)
        return allocated(self._run)


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch has allocated at once within a call, as its profiler counts them.

    What the process grows by would be no measure: libc keeps what was freed before and gives it out again.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
