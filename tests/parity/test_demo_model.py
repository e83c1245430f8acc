"""The embedded model is a Hugging Face model: transformers computes what we compute."""

from importlib import resources
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.demo import corpus
from mlxlora.model import load

pytestmark = pytest.mark.parity


def test_transformers_reads_the_embedded_model() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = Path(str(resources.files("mlxlora.demo"))) / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours = load(directory)
    ours.network.set_dtype(mx.float32)
    for document in corpus.documents(11, 3):
        ids = ours.tokenizer.encode(document).ids
        with torch.no_grad():
            expected = theirs(torch.tensor(ids[None].astype(np.int64))).logits.numpy()
        found = np.array(ours.network(mx.array(ids[None])))
        assert np.abs(found - expected).max() < 1e-3
