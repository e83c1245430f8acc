"""Fine-tune language models with MLX: what the command line does, as functions.

>>> from mlxlora import AdapterConfig, complete, finetune, load
>>> result = finetune("mlx-community/Qwen3-0.6B-4bit", ["chats.jsonl"], "run", adapter=AdapterConfig(rank=8))
>>> model = load("mlx-community/Qwen3-0.6B-4bit", adapter=[str(result.run)])
>>> complete(model, "Why do leaves turn red?").text

Verbs:     convert, plan, tune, finetune (`mlxlora train`), evaluate (`mlxlora eval`), compare, generate, serve, fuse,
           merge, report, doctor; `mlxlora_convert.export` has export and import_
Options:   SamplesConfig, AdapterConfig, OptimizerConfig, TrainingConfig, QuantizeConfig, SamplingConfig, SearchConfig
Models:    load, save, LanguageModel with its adapters, complete, stream, Dialogue
Parts:     load_data, from_rows, load_tokenizer, Dataset; inject, remove, load_adapter, save_adapter; Engine; Control
Errors:    MlxLoraError and its kinds, in mlxlora.errors; events of a run: mlxlora.training.events
"""

from mlxlora.adapters import AdapterConfig, inject, load_adapter, remove, save_adapter
from mlxlora.compare import compare
from mlxlora.convert import convert
from mlxlora.data import BatchConfig, Dataset, SamplesConfig, from_rows
from mlxlora.data import load as load_data
from mlxlora.dialogue import Dialogue
from mlxlora.doctor import doctor
from mlxlora.engine import Engine, EngineConfig
from mlxlora.errors import (
    AdapterError,
    ConfigError,
    DataError,
    InputError,
    MlxLoraError,
    ModelError,
    RunError,
    TrainingError,
    UnsupportedError,
)
from mlxlora.evaluate import evaluate
from mlxlora.finetune import finetune
from mlxlora.fuse import fuse
from mlxlora.generate import SamplingConfig, complete, generate, stream
from mlxlora.merge import merge
from mlxlora.model import LanguageModel, load, load_tokenizer, save
from mlxlora.plan import plan
from mlxlora.quantize import QuantizeConfig
from mlxlora.reporting.report import report
from mlxlora.reporting.watch import FinetuneResult
from mlxlora.serve import serve
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Control
from mlxlora.training.optimizer import OptimizerConfig
from mlxlora.trials import SearchConfig
from mlxlora.tune import tune
from mlxlora.version import __version__

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "BatchConfig",
    "ConfigError",
    "Control",
    "DataError",
    "Dataset",
    "Dialogue",
    "Engine",
    "EngineConfig",
    "FinetuneResult",
    "InputError",
    "LanguageModel",
    "MlxLoraError",
    "ModelError",
    "OptimizerConfig",
    "QuantizeConfig",
    "RunError",
    "SamplesConfig",
    "SamplingConfig",
    "SearchConfig",
    "TrainingConfig",
    "TrainingError",
    "UnsupportedError",
    "__version__",
    "compare",
    "complete",
    "convert",
    "doctor",
    "evaluate",
    "finetune",
    "from_rows",
    "fuse",
    "generate",
    "inject",
    "load",
    "load_adapter",
    "load_data",
    "load_tokenizer",
    "merge",
    "plan",
    "remove",
    "report",
    "save",
    "save_adapter",
    "serve",
    "stream",
    "tune",
]
