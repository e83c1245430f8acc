"""The public names: a list that changes on purpose."""

import inspect
import subprocess
import sys

import mlxlora

NAMES = """
    AdapterConfig AdapterError BatchConfig ConfigError Control DataError Dataset Dialogue Engine EngineConfig
    FinetuneResult InputError LanguageModel MlxLoraError ModelError OptimizerConfig QuantizeConfig RunError
    SamplesConfig SamplingConfig TrainingConfig TrainingError UnsupportedError __version__ complete convert doctor
    evaluate finetune fuse generate inject load merge
    load_adapter load_data remove report save save_adapter serve stream
    SearchConfig compare from_rows load_tokenizer plan tune
"""


def test_the_public_names_are_these() -> None:
    assert sorted(mlxlora.__all__) == sorted(NAMES.split())


def test_each_is_there_and_says_what_it_does() -> None:
    for name in mlxlora.__all__:
        value = getattr(mlxlora, name)
        assert not inspect.ismodule(value), f"{name} is hidden by the module of the same name"
        assert name == "__version__" or inspect.getdoc(value), f"{name} has no docstring"


def test_importing_is_light() -> None:
    heavy = ["mlx_lm", "transformers", "torch", "gguf", "datasets", "pyarrow", "rich", "jsonargparse"]
    code = f"import sys, mlxlora, mlxlora.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
