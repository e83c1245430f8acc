"""The embedded model is a Hugging Face model: transformers computes what we compute, and so does llama.cpp."""

from importlib import resources
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.demo import corpus
from mlxlora.model import load
from mlxlora_convert.gguf_file import export_gguf
from mlxlora_convert.llamacpp import LlamaCpp
from mlxlora_convert.probe import log_probs
from tests.vocabularies import texts

pytestmark = pytest.mark.parity
MODEL = Path(str(resources.files("mlxlora.demo"))) / "model"


def test_transformers_reads_the_embedded_model() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ours = load(MODEL)
    ours.network.set_dtype(mx.float32)
    for document in corpus.documents(11, 3):
        ids = ours.tokenizer.encode(document).ids
        with torch.no_grad():
            expected = theirs(torch.tensor(ids[None].astype(np.int64))).logits.numpy()
        found = np.array(ours.network(mx.array(ids[None])))
        assert np.abs(found - expected).max() < 1e-3


def test_llama_cpp_reads_the_embedded_model(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    written = export_gguf(MODEL, tmp_path / "demo.gguf", type="f32")
    ours = load(MODEL)
    ours.network.set_dtype(mx.float32)
    strings = [*texts(), "x'start", "a -- b --- c", "WHERE region = 'south' -- it's 1234", *corpus.documents(11, 50)]
    ids = [int(token) for token in ours.tokenizer.encode(strings[-1]).ids][:40]
    with LlamaCpp(written.path, threads=1) as reader:
        assert reader.tokenize_all(strings, special=True) == [list(ours.tokenizer.encode(text).ids) for text in strings]
        theirs = reader.log_probs(ids, 1024)
    assert np.abs(log_probs(ours.network, ids) - theirs).max() < 1e-4
