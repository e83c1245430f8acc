"""Adapter layers, and the surgery that puts them into a model."""

from mlxlora.adapters.config import AdapterConfig, LayerConfig
from mlxlora.adapters.dora import DoRAEmbedding, DoRALinear
from mlxlora.adapters.files import Adapter, Module, find, parse_spec, read_adapter, save_adapter, write_adapter
from mlxlora.adapters.inject import Injection, inject, injected, remove
from mlxlora.adapters.layer import AdapterLayer, adapter_layers, set_dropout_keys
from mlxlora.adapters.live import Adapters, LiveAdapter, attach
from mlxlora.adapters.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlxlora.adapters.select import block_paths
from mlxlora.adapters.state import check_fits, collect, load_adapter

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterLayer",
    "Adapters",
    "DoRAEmbedding",
    "DoRALinear",
    "Injection",
    "LayerConfig",
    "LiveAdapter",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRASwitchLinear",
    "Module",
    "adapter_layers",
    "attach",
    "block_paths",
    "check_fits",
    "collect",
    "find",
    "inject",
    "injected",
    "load_adapter",
    "parse_spec",
    "read_adapter",
    "remove",
    "save_adapter",
    "set_dropout_keys",
    "write_adapter",
]
