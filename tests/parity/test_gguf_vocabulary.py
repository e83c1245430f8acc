"""Vocabularies in GGUF: llama.cpp cuts texts into the same tokens, and so does the tokenizer rebuilt from the file."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from mlxlora.errors import UnsupportedError
from mlxlora.tokenizer import Tokenizer
from mlxlora_convert import gguf_pretokenizers
from mlxlora_convert.gguf_file import export_gguf
from mlxlora_convert.gguf_import import import_gguf
from mlxlora_convert.llamacpp import LlamaCpp
from tests import tiny
from tests.vocabularies import CORPUS, model_with, sentencepiece_directory, texts

pytestmark = pytest.mark.parity
pytest.importorskip("xllamacpp", reason="pip install xllamacpp")


def has_case_or_marks(letter: str) -> bool:
    """What `PreTokenizer.differs` speaks of."""
    category = unicodedata.category(letter)
    return category[0] == "M" or (category in ("Lu", "Lt") and not letter.isascii())


def byte_level_tokenizer(known: gguf_pretokenizers.PreTokenizer) -> Any:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer

    made = Fast(models.BPE())
    splitting = gguf_pretokenizers.tokenizer_json(known)
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    state = json.loads(made.to_str()) | {"pre_tokenizer": splitting}
    made = Fast.from_str(json.dumps(state))
    made.decoder = decoders.ByteLevel()
    assert isinstance(made.pre_tokenizer, PreTokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=list(tiny.SPECIAL), initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(CORPUS * 4, trainer)
    state = json.loads(made.to_str())
    if known.ignore_merges:  # words that no merge makes: taken whole all the same
        state["model"]["ignore_merges"] = True
        for word in ("Ġunmergeable", "xyzzyplugh", "ĠHelloXyz"):
            state["model"]["vocab"][word] = len(state["model"]["vocab"])
    if known.normalizer:
        state["normalizer"] = {"type": known.normalizer}
    return state


def assert_same_tokens(directory: Path, after: Path, written: Path, strings: list[str], **how: Any) -> None:
    ours = Tokenizer.load(directory).hf
    expected = [list(ours.encode(text, add_special_tokens=how.get("special", False))) for text in strings]
    with LlamaCpp(written, threads=1) as reader:
        found = reader.tokenize_all(strings, **how)
    different = [(text, a, b) for text, a, b in zip(strings, expected, found, strict=True) if a != b]
    assert not different, f"{len(different)} of {len(strings)}, first: {different[0]}"
    again = Tokenizer.load(after).hf
    rebuilt = [list(again.encode(text, add_special_tokens=how.get("special", False))) for text in strings]
    assert rebuilt == expected
    assert [again.decode(ids) for ids in rebuilt] == [ours.decode(ids) for ids in expected]


@pytest.mark.parametrize("known", gguf_pretokenizers.KNOWN, ids=lambda known: known.names[0])
def test_every_pre_tokenizer(tmp_path: Path, known: gguf_pretokenizers.PreTokenizer) -> None:
    strings = [*texts(), " unmergeable", "xyzzyplugh", "unmergeable xyzzyplugh HelloXyz"]
    if known.differs:
        strings = [text for text in strings if not any(map(has_case_or_marks, text))]
    assert len(strings) > (300 if known.differs else 500)
    directory = model_with(tmp_path / "model", byte_level_tokenizer(known))
    written = export_gguf(directory, tmp_path / "model.gguf", type="f16")
    import_gguf(written.path, tmp_path / "after")
    assert_same_tokens(directory, tmp_path / "after", written.path, strings)


@pytest.mark.parametrize(
    "options",
    [
        {"split_digits": True},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<start_of_turn>", "\n\n", "▁▁"]},
        {"split_digits": True, "user_defined_symbols": ["<tool>", "[INST]"]},
    ],
    ids=["llama", "gemma", "own symbols"],
)
def test_sentencepiece(tmp_path: Path, options: dict[str, Any]) -> None:
    directory, judge = sentencepiece_directory(tmp_path / "source", **options)
    strings = [*texts(), "a\n\nb", "x  y   z"]
    if "add_dummy_prefix" in options:  # with one, llama.cpp puts ▁ after a symbol, and export says so
        strings += ["<start_of_turn>user\n\n\nx", "a<start_of_turn>  b"]
    written = export_gguf(directory, tmp_path / "model.gguf", type="f16")
    import_gguf(written.path, tmp_path / "after")
    assert_same_tokens(directory, tmp_path / "after", written.path, strings)
    with LlamaCpp(written.path, threads=1) as reader:
        found = reader.tokenize_all(strings)
        assert found == [judge.encode(text) for text in strings]
        assert reader.tokenize("Hello", special=True)[0] == judge.bos_id()


def test_bos_and_eos_are_added_alike(tmp_path: Path) -> None:
    state = byte_level_tokenizer(gguf_pretokenizers.KNOWN[0])
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    state["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    directory = model_with(tmp_path / "model", state, bos_token="<|endoftext|>")
    written = export_gguf(directory, tmp_path / "model.gguf", type="f16")
    import_gguf(written.path, tmp_path / "after")
    strings = ["Hello", "", "a<|im_end|>b", "<|im_start|>user\nHi<|im_end|>\n"]
    assert_same_tokens(directory, tmp_path / "after", written.path, strings, special=True)


def test_a_pre_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    state = byte_level_tokenizer(gguf_pretokenizers.KNOWN[3])
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W"
    directory = model_with(tmp_path / "model", state)
    with pytest.raises(UnsupportedError, match=r"knows no pre-tokenizer with these expressions"):
        export_gguf(directory, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
