"""Adapter layers, and the surgery that puts them into a model."""

from mlxlora.adapters.config import AdapterConfig, LayerConfig
from mlxlora.adapters.inject import Injection, inject, injected, remove
from mlxlora.adapters.layer import AdapterLayer, adapter_layers, set_dropout_keys
from mlxlora.adapters.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlxlora.adapters.select import block_paths

__all__ = [
    "AdapterConfig",
    "AdapterLayer",
    "Injection",
    "LayerConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRASwitchLinear",
    "adapter_layers",
    "block_paths",
    "inject",
    "injected",
    "remove",
    "set_dropout_keys",
]
