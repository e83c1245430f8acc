"""Vocabularies in GGUF: llama.cpp cuts texts into the same tokens, and so does the tokenizer rebuilt from the file."""

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from mlxlora import sentencepiece_model
from mlxlora.errors import UnsupportedError
from mlxlora.tokenizer import Tokenizer
from mlxlora_convert import gguf_pretokenizers
from mlxlora_convert.gguf_file import export_gguf
from mlxlora_convert.gguf_import import import_gguf
from mlxlora_convert.llamacpp import LlamaCpp
from tests import tiny

pytestmark = pytest.mark.parity
pytest.importorskip("xllamacpp", reason="pip install xllamacpp")

BLOCKS = [  # first and last of the letters of many scripts, and of symbols
    (0x41, 0x7A), (0xC0, 0x24F), (0x250, 0x2AF), (0x370, 0x3FF), (0x400, 0x52F), (0x531, 0x587), (0x5D0, 0x5EA),
    (0x620, 0x6D3), (0x710, 0x72F), (0x904, 0x94D), (0x985, 0x9CD), (0xA05, 0xA4D), (0xB85, 0xBCD), (0xC05, 0xC4D),
    (0xD05, 0xD4D), (0xD85, 0xDDF), (0xE01, 0xE4E), (0xE81, 0xEC4), (0xF40, 0xF87), (0x1000, 0x1049), (0x10A0, 0x10FF),
    (0x1100, 0x11FF), (0x1200, 0x135A), (0x13A0, 0x13F5), (0x1780, 0x17D3), (0x1820, 0x1877), (0x1E00, 0x1FFF),
    (0x2000, 0x206F), (0x20A0, 0x20BF), (0x2100, 0x218B), (0x2190, 0x21FF), (0x2200, 0x22FF), (0x2460, 0x24FF),
    (0x2500, 0x257F), (0x2700, 0x27BF), (0x3040, 0x30FF), (0x3105, 0x312F), (0x4E00, 0x4FFF), (0xAC00, 0xAD00),
    (0xFB00, 0xFB4F), (0xFF01, 0xFF5E), (0x1D400, 0x1D4FF), (0x1F300, 0x1F5FF), (0x1F600, 0x1F64F), (0x20000, 0x20100),
]  # fmt: skip
CORPUS = [
    "The quick brown fox jumps over the lazy dog. They're here, we'll see, I'd say, it's DON'T and can't.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich — 1234567890 Mal, 3.14159 und 42.",
    "Съешь ещё этих мягких французских булок, да выпей чаю.  Η γρήγορη αλεπού. שלום עולם. مرحبا بالعالم.",
    "東京は日本の首都です。 你好世界，今天天气很好。 안녕하세요 세계. नमस्ते दुनिया। สวัสดีชาวโลก",
    "def add(a, b):\n    return a + b  # 12 + 3456\n\n\nclass Point:\n\tx: int = 0\r\n    <div class='x'>&amp;</div>",
    "HelloWorld camelCase snake_case SCREAMING_CASE kebab-case/path/to/file.txt https://example.org?q=1&r=2",
]


def texts() -> list[str]:
    """More than 500 strings: every script, words with spaces, digits, punctuation and line ends between them."""
    draw = random.Random(7)
    between = [
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "'",
        "'s ",
        ", ",
        ". ",
        "-",
        "/",
        "_",
        " (",
        "1",
        " 23 ",
        "4567",
        "!?",
        "",
    ]
    found = [
        "",
        " ",
        "  ",
        "\n",
        " \n",
        "\n ",
        "\r\n",
        "\t\t",
        "a",
        " a",
        "a ",
        "I'm",
        "I'M",
        "we'Ve",
        "'s",
        "''S",
        "x'",
    ]
    found += ["…", "1", "12", "123", "1234", "12345678", "½ ² Ⅷ ٣٤٥", "e\u0301", "\u00a0x", "\u3000y", "a\u200db", "☃️❤️"]
    found += [line[start : start + 40] for line in CORPUS for start in range(0, len(line), 13)]
    while len(found) < 560:
        low, high = draw.choice(BLOCKS)
        words = []
        for _ in range(draw.randint(1, 5)):
            letters = (chr(draw.randint(low, high)) for _ in range(draw.randint(1, 7)))
            words.append("".join(letter for letter in letters if unicodedata.category(letter) != "Cn"))
            words.append(draw.choice(between))
        found.append("".join(words))
    return [unicodedata.normalize("NFC", text) for text in found]


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


def model_with(path: Path, tokenizer_json: dict[str, Any], **settings: Any) -> Path:
    size = 1 + max([*tokenizer_json["model"]["vocab"].values(), *(t["id"] for t in tokenizer_json["added_tokens"])])
    tiny.model_directory(path, "llama", vocab_size=size + 5)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    config = json.loads((path / "tokenizer_config.json").read_text()) | settings
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


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


def sentencepiece_directory(path: Path, **options: Any) -> tuple[Path, Any]:
    import sentencepiece

    path.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_prefix=str(path / "tokenizer"), vocab_size=600, minloglevel=2,
        hard_vocab_limit=False, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=0.98, **options,
    )  # fmt: skip
    (path / "tokenizer.vocab").unlink()
    out = path.with_name(f"{path.name}-fast")
    out.mkdir()
    sentencepiece_model.convert(path, out)
    judge = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    state = json.loads((out / "tokenizer.json").read_text())
    settings = json.loads((out / "tokenizer_config.json").read_text())
    return model_with(path.with_name("model"), state, **settings), judge


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
