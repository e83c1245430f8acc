"""The fast tokenizer made of a sentencepiece file encodes as sentencepiece does, whatever the file's settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxlora import sentencepiece_model
from mlxlora.errors import FormatError, ModelError, UnsupportedError

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all.",
    "Question: what is the capital of France? Answer: Paris is the capital of France.",
    "def add(a, b): return a + b  # 12345 67890",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "東京は日本の首都です。 いろはにほへと",
    "they're we'll don't can't some words again and again, some words again and again",
] * 20
LLAMA: dict[str, Any] = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True, "allow_whitespace_only_pieces": True,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gemma": {**LLAMA, "add_dummy_prefix": False},
    "bpe, normalised": {"model_type": "bpe"},
    "bpe, byte fallback, normalised": {"model_type": "bpe", "byte_fallback": True},
    "bpe, own symbols": {**LLAMA, "user_defined_symbols": ["<tool>", "[INST]"]},
    "gemma, own symbols": {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": ["<start_of_turn>", "\n\n"]},
    "unigram": {"model_type": "unigram"},
    "unigram, byte fallback": {"model_type": "unigram", "byte_fallback": True},
    "unigram, identity": {
        "model_type": "unigram",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
}


def train(path: Path, **options: Any) -> Path:
    import sentencepiece

    path.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(path / "tokenizer"), vocab_size=options.pop("vocab_size", 450),
        minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip
    (path / "tokenizer.vocab").unlink()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_encodes_as_sentencepiece_does(tmp_path: Path, kind: str) -> None:
    source, out = train(tmp_path / "source", **KINDS[kind]), tmp_path / "out"
    out.mkdir()
    assert sentencepiece_model.needed(source)
    assert sentencepiece_model.convert(source, out) > 500  # convert() itself compares, and refuses a difference

    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    theirs = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    ours = AutoTokenizer.from_pretrained(out)
    for text in ("Hello there,  world", "日本 über 99"):
        ids = ours.encode(text)
        assert ids == [theirs.bos_id(), *theirs.encode(text)]
    assert ours.decode(theirs.encode("the quick dog")) == "the quick dog"


def test_settings_are_kept_and_tokens_added(tmp_path: Path) -> None:
    source, out = train(tmp_path / "source", **LLAMA), tmp_path / "out"
    out.mkdir()
    import sentencepiece

    size = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model")).get_piece_size()
    settings = {
        "tokenizer_class": "SomeOtherTokenizer", "chat_template": "{{ messages }}", "add_bos_token": False,
        "eos_token": "<|end|>", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
        "added_tokens_decoder": {str(size): {"content": "<|end|>", "special": True}},
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    sentencepiece_model.convert(source, out)
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(out)
    assert fast.eos_token_id == size and fast.chat_template == "{{ messages }}"
    assert fast.encode("the<|end|>")[-1] == size
    assert fast.bos_token_id not in fast.encode("the")
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())


def test_added_tokens_must_follow_the_vocabulary(tmp_path: Path) -> None:
    source, out = train(tmp_path / "source", **LLAMA), tmp_path / "out"
    out.mkdir()
    (source / "added_tokens.json").write_text(json.dumps({"<|far|>": 9000}))
    with pytest.raises(ModelError, match=r"<\|far\|>"):
        sentencepiece_model.convert(source, out)


def test_what_is_no_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff\xff\xff not a model")
    with pytest.raises(FormatError, match="no sentencepiece model"):
        sentencepiece_model.convert(tmp_path, tmp_path)
    source = train(tmp_path / "words", model_type="word", vocab_size=60)
    with pytest.raises(UnsupportedError, match="words"):
        sentencepiece_model.convert(source, tmp_path)


def test_a_difference_refuses_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = train(tmp_path / "source", **LLAMA), tmp_path / "out"
    out.mkdir()
    honest = sentencepiece_model._merges
    monkeypatch.setattr(sentencepiece_model, "_merges", lambda spec: honest(spec)[::-1])
    with pytest.raises(ModelError, match="strings differ"):
        sentencepiece_model.convert(source, out)
