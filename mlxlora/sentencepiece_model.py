"""A folder that holds only sentencepiece's `tokenizer.model` gets a fast tokenizer that is right.

The vocabulary is rebuilt as a `tokenizers` model from what the sentencepiece file itself says (kind, scores,
normaliser, dummy prefix, byte fallback), never from the name of a class. Then both programs encode several hundred
strings of many scripts, and one differing id refuses the conversion: a tokenizer that is nearly right ruins a model
without an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxlora import files
from mlxlora.errors import FormatError, ModelError, Problem, UnsupportedError

SPACE = "▁"
# `type` of a piece in the sentencepiece file
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2


def needed(directory: Path) -> bool:
    """Whether a model directory has a sentencepiece file and nothing that a fast tokenizer could be read from."""
    return (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").exists()


def convert(source: Path, directory: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json for `source/tokenizer.model` into `directory`.

    Returns on how many strings the result was found equal to sentencepiece.
    Raises FormatError for a file that is no sentencepiece model, UnsupportedError for one whose kind cannot be said as
    a fast tokenizer, ModelError when the result would encode anything differently.
    """
    spec = _read(source / "tokenizer.model")
    settings = _settings(source)
    legacy = settings.get("legacy", True) is not False
    built = _tokenizer(spec, settings, legacy)
    _add_tokens(built, spec, source, settings)
    built.save(str(directory / "tokenizer.json"))
    files.write_json(directory / "tokenizer_config.json", _fast_settings(spec, settings))
    return _verify(source / "tokenizer.model", directory, spec, legacy)


def _read(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    spec = sentencepiece_model_pb2.ModelProto()
    try:
        spec.ParseFromString(path.read_bytes())
    except DecodeError:
        raise FormatError(f"{path} is no sentencepiece model.") from None
    if not spec.pieces:
        raise FormatError(f"{path} is a sentencepiece model without pieces.")
    kind, normalizer = spec.trainer_spec.model_type, spec.normalizer_spec
    if kind not in (UNIGRAM, BPE):
        raise UnsupportedError(f"{path}: a sentencepiece model of words or characters cannot be a fast tokenizer.")
    if spec.trainer_spec.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise UnsupportedError(f"{path}: its way of marking spaces cannot be said by a fast tokenizer.")
    return spec


def _settings(source: Path) -> dict[str, Any]:
    path = source / "tokenizer_config.json"
    settings = files.read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise ModelError(f"{path} holds no object.")
    special = source / "special_tokens_map.json"
    if special.is_file():
        named = files.read_json(special)
        settings = {**(named if isinstance(named, dict) else {}), **settings}
    return settings


def _tokenizer(spec: Any, settings: dict[str, Any], legacy: bool) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = [(piece.piece, piece.score) for piece in spec.pieces]
    bytes_known = spec.trainer_spec.byte_fallback
    user = sorted((piece.piece for piece in spec.pieces if piece.type == USER_DEFINED), key=len, reverse=True)
    unknown = next((i for i, piece in enumerate(spec.pieces) if piece.type == UNKNOWN), None)
    if spec.trainer_spec.model_type == BPE:
        vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
        unk = None if unknown is None else pieces[unknown][0]
        model: Any = models.BPE(vocabulary, _merges(spec), unk_token=unk, fuse_unk=True, byte_fallback=bytes_known)
        model.ignore_merges = bool(user)  # what the splitter isolates is one token, whatever merges could make of it
    else:
        model = models.Unigram(pieces, unknown, bytes_known)
    built = Tokenizer(model)

    rules = spec.normalizer_spec
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    built.normalizer = normalizers.Sequence(steps)
    splits: list[Any] = []
    if rules.add_dummy_prefix and not legacy:  # no prefix after a control token: transformers' `legacy: false`
        splits.append(pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False))
    if user:
        escaped = "|".join(re.escape(piece.replace(" ", SPACE)) for piece in user)
        splits.append(pre_tokenizers.Split(Regex(escaped), behavior="isolated"))
    if splits:
        built.pre_tokenizer = pre_tokenizers.Sequence(splits)

    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        undo.append(decoders.Strip(content=" ", left=1, right=0))
    built.decoder = decoders.Sequence(undo)
    _begin_and_end(built, spec, settings)
    return built


def _merges(spec: Any) -> list[tuple[str, str]]:
    """Every way in which a piece is put together from two others, best score first: what sentencepiece's BPE does."""
    usable = {piece.piece: i for i, piece in enumerate(spec.pieces) if piece.type in (NORMAL, USER_DEFINED, UNUSED)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece in spec.pieces:
        text = piece.piece
        if piece.type not in (NORMAL, UNUSED):
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in usable and right in usable:
                ranked.append((-piece.score, usable[left], usable[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _special(spec: Any, settings: dict[str, Any], role: str) -> str | None:
    """The token that plays a role ("bos", "eos", …): what the settings say, else what the sentencepiece file says."""
    said = settings.get(f"{role}_token")
    if isinstance(said, dict):
        said = said.get("content")
    if isinstance(said, str):
        return said
    if f"{role}_token" in settings:
        return None
    number = getattr(spec.trainer_spec, f"{role}_id")
    return spec.pieces[number].piece if 0 <= number < len(spec.pieces) else None


def _begin_and_end(built: Any, spec: Any, settings: dict[str, Any]) -> None:
    from tokenizers import processors

    bos, eos = _special(spec, settings, "bos"), _special(spec, settings, "eos")
    before = f"{bos}:0 " if bos and settings.get("add_bos_token", True) else ""
    after = f" {eos}:0" if eos and settings.get("add_eos_token", False) else ""
    if not before and not after:
        return
    used = [token for token, there in ((bos, before), (eos, after)) if there and token]
    numbers = [(token, built.token_to_id(token)) for token in used]
    missing = [token for token, number in numbers if number is None]
    if missing:
        raise ModelError(
            f"tokenizer_config.json names {missing[0]!r}, which the sentencepiece vocabulary does not have."
        )
    single = f"{before}$A:0{after}"
    pair = f"{single} {before.replace(':0', ':1')}$B:1{after.replace(':0', ':1')}"
    built.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=numbers)


def _add_tokens(built: Any, spec: Any, source: Path, settings: dict[str, Any]) -> None:
    """Control tokens of the file, and tokens that were added after the vocabulary was trained, at their ids."""
    from tokenizers import AddedToken

    wanted: dict[int, Any] = {
        number: AddedToken(piece.piece, special=True, normalized=False)
        for number, piece in enumerate(spec.pieces)
        if piece.type in (CONTROL, UNKNOWN)
    }
    extra = source / "added_tokens.json"
    if extra.is_file():
        for text, number in dict(files.read_json(extra)).items():
            wanted[int(number)] = AddedToken(text, special=True, normalized=False)
    for number, entry in settings.get("added_tokens_decoder", {}).items():
        flags = {name: bool(entry[name]) for name in ("lstrip", "rstrip", "single_word", "special") if name in entry}
        wanted[int(number)] = AddedToken(entry["content"], normalized=False, **flags)
    problems = []
    for number in sorted(wanted):
        token = wanted[number]
        (built.add_special_tokens if token.special else built.add_tokens)([token])
        if built.token_to_id(token.content) != number:
            problems.append(
                Problem(token.content, f"would get id {built.token_to_id(token.content)} where the model has {number}")
            )
    if problems:
        raise ModelError.of(f"The added tokens of {source} do not follow the sentencepiece vocabulary:", problems)


def _fast_settings(spec: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json for the fast tokenizer: what was said before, less what is about another class."""
    dropped = ("auto_map", "legacy", "sp_model_kwargs", "use_default_system_prompt", "slow_tokenizer_class", "use_fast")
    kept = {name: value for name, value in settings.items() if name not in dropped}
    for role in ("bos", "eos", "unk", "pad"):
        token = _special(spec, settings, role)
        if token is not None:
            kept.setdefault(f"{role}_token", token)
    return {**kept, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def _verify(model: Path, directory: Path, spec: Any, legacy: bool) -> int:
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    reference = SentencePieceProcessor(model_file=str(model))
    fast = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    control = [piece.piece for piece in spec.pieces if piece.type in (CONTROL, UNKNOWN)]
    problems, count = [], 0
    for text in strings(spec):
        if any(token in text for token in control) or (not legacy and text.startswith(" ")):
            continue
        expected, got = reference.encode(text), fast.encode(text, add_special_tokens=False)
        count += 1
        if expected != got:
            problems.append(
                Problem(repr(text), f"sentencepiece encodes it as {expected[:12]}, the result as {got[:12]}")
            )
    if problems:
        raise ModelError.of(
            f"{model} cannot be turned into a fast tokenizer that encodes like sentencepiece "
            f"({len(problems)} of {count} strings differ):",
            problems,
        )
    return count


_PHRASES = (
    "Hello world", "The quick brown fox jumps over the lazy dog.", "don't can't I'll we've",
    "e.g. 3.14, 1,000,000 and 0x1F", "def f(x):\n    return x ** 2", "if (a && b) { c += 1; }",
    "https://example.org/a?b=c&d=e#f", "user@example.com",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "L'été, le garçon naïf a mangé des crêpes à Noël",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia", "Pchnąć w tę łódź jeża lub ośm skrzyń fig",
    "Příliš žluťoučký kůň úpěl ďábelské ódy", "Съешь ещё этих мягких французских булок",
    "Γαζέες καὶ μυρτιὲς δὲν θὰ βρῶ πιὰ", "שפן אכל קצת גזר בטעם חסה", "نص حكيم له سر قاطع وذو شأن عظيم",
    "ऋषियों को सताने वाले दुष्ट राक्षसों", "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า", "いろはにほへと ちりぬるを",
    "東京は日本の首都です。", "天地玄黄 宇宙洪荒", "키스의 고유조건은 입술끼리 만나야 하고",
    "Trăm năm trong cõi người ta", "😀 👩‍👩‍👧‍👦 🇩🇪 ✨", "½ ﬁ ① Ａ ㎏ ™ …", "a\u0301 \u00e1 n\u0303",
    "\u200bzero\u200dwidth\ufeff", "tabs\tand\u00a0no-break", "ALL CAPS TEXT",
    "snake_case camelCase kebab-case", "(parentheses) [brackets] {braces} <angle>", "♥♦♣♠ →←↑↓ ∀∃∈∉ ∑∏√∞",
    "1234567890", "2024-01-31T23:59:59Z", "aaaaaaaaaaaaaaaaaaaa", "The the THE tHe", "\U0001d54f\U0001d550",
    "$5.00 €10 £3 ¥100", "#hashtag @mention", "line one\nline two\r\nline three", "x", "é", "中", "🙂",
)  # fmt: skip


def strings(spec: Any) -> Iterator[str]:
    """What both programs have to encode alike: phrases of many scripts, spaced in many ways, and the file's pieces."""
    yield ""
    forms = ("{}", " {}", "{} ", "  {}  ", "\n{}", "{}\n\n", "\t{}", "{}!", "“{}”", "a {} b", "{0} {0}", "{0}  {0}")
    for phrase in _PHRASES:
        for form in forms:
            yield form.replace("{0}", phrase).replace("{}", phrase)
    step = max(len(spec.pieces) // 200, 1)
    for piece in spec.pieces[::step]:
        if piece.type in (NORMAL, USER_DEFINED):
            text = piece.piece.replace(SPACE, " ")
            yield from (text, f"x{text}y")
    for piece in spec.pieces:
        if piece.type == USER_DEFINED:
            yield from (f"before {piece.piece} after", piece.piece, f"{piece.piece}{piece.piece}")
