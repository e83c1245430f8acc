"""The pre-tokenizers that llama.cpp knows by name, as the regular expressions that tokenizer.json spells out.

llama.cpp does not read regular expressions from a GGUF file: it has a list of names, each with rules in its code. So a
vocabulary can be exported when its pre-tokenizer is one of these, which is decided by comparing the expressions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlxlora.errors import UnsupportedError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3 = rf"{SHORT_FORMS}|{WORD}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{SHORT_FORMS}|{WORD}|\p{{N}}|{REST}"
QWEN35 = (
    rf"{SHORT_FORMS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}|{SLASHED}"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SHORT_FORMS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SHORT_FORMS}?"
    rf"|\p{{N}}{{1,3}}|{SLASHED}"
)
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^" + "\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[" + "\r\n" + r"]*|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+"
)


MARKS = "words with combining marks, and capitals of alphabets other than Latin,"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One of llama.cpp's pre-tokenizers.

    names:         what `tokenizer.ggml.pre` may say; the first is written
    steps:         the regular expressions, each splitting what the one before left
    ignore_merges: a whole word of the vocabulary is taken as it is, without merging
    normalizer:    the Unicode normalisation that models with it have (llama.cpp does none)
    differs:       for which texts llama.cpp's rules are not quite the expressions
    """

    names: tuple[str, ...]
    steps: tuple[str, ...]
    ignore_merges: bool = False
    normalizer: str | None = None
    differs: str = ""


# In this order of preference where two rows say the same.
KNOWN: tuple[PreTokenizer, ...] = (
    PreTokenizer(("gpt-2", "phi-2", "olmo", "mpt", "gigachat", "exaone4", "trillion", "granite-docling"), (GPT2,)),
    PreTokenizer(
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"), (DIGIT, GPT2)
    ),
    PreTokenizer(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"), (LLAMA3,), ignore_merges=True),
    PreTokenizer(("smaug-bpe", "dbrx", "chatglm-bpe", "glm4"), (LLAMA3,)),
    PreTokenizer(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "grok-2", "kormo"), (QWEN2,), normalizer="NFC"
    ),
    PreTokenizer(("qwen35",), (QWEN35,), normalizer="NFC"),
    PreTokenizer(("tekken",), (TEKKEN,), ignore_merges=True, differs=MARKS),
    PreTokenizer(("gpt-4o", "llama4", "minimax-m2"), (GPT4O,), differs=MARKS),
    PreTokenizer(("deepseek-v3", "hunyuan-dense", "joyai-llm"), (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3)),
)


def steps_of(pre_tokenizer: dict[str, Any] | None) -> list[str]:
    """The splitting expressions of tokenizer.json's `pre_tokenizer`, byte-level encoding taken for granted.

    Raises UnsupportedError for steps of another kind.
    """
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in steps_of(part)]
    if kind == "ByteLevel":
        if pre_tokenizer.get("add_prefix_space"):
            raise UnsupportedError("The tokenizer puts a space before the text, which llama.cpp does not do for it.")
        return [GPT2] if pre_tokenizer.get("use_regex", True) else []
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return [DIGIT]
    if kind == "Split":
        whole = (pre_tokenizer.get("behavior"), bool(pre_tokenizer.get("invert"))) in (
            ("Isolated", False),
            ("Removed", True),  # the same where the expression covers every character, as those of `KNOWN` do
        )
        expression = pre_tokenizer.get("pattern", {}).get("Regex")
        if whole and isinstance(expression, str):
            return [expression]
    raise UnsupportedError(f"llama.cpp knows no pre-tokenizer like this step of tokenizer.json: {pre_tokenizer}")


def find(pre_tokenizer: dict[str, Any] | None, *, ignore_merges: bool) -> PreTokenizer:
    """llama.cpp's pre-tokenizer that splits as tokenizer.json's does. Raises UnsupportedError when there is none."""
    steps = tuple(same_spelling(step) for step in steps_of(pre_tokenizer))
    for known in KNOWN:
        if tuple(map(same_spelling, known.steps)) == steps and known.ignore_merges == ignore_merges:
            return known
    listed = "\n".join(f"  {step}" for step in steps) or "  (none)"
    raise UnsupportedError(
        f"llama.cpp knows no pre-tokenizer with these expressions (ignore_merges {ignore_merges}):\n{listed}\n"
        "It would cut words elsewhere and the model would see other tokens, so nothing was written."
    )


def same_spelling(expression: str) -> str:
    """One spelling for expressions that say the same: escaped line ends, the short forms of English verbs."""
    spelled = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    return expression.replace(spelled, SHORT_FORMS).replace("\r", r"\r").replace("\n", r"\n").replace(r"\"", '"')


def by_name(name: str) -> PreTokenizer:
    """The pre-tokenizer of this name. Raises UnsupportedError for a name without a row."""
    for known in KNOWN:
        if name in known.names:
            return known
    names = ", ".join(known.names[0] for known in KNOWN)
    raise UnsupportedError(f"The pre-tokenizer '{name}' of this GGUF file cannot be rebuilt yet. Known: {names}, …")


def tokenizer_json(known: PreTokenizer) -> dict[str, Any]:
    """tokenizer.json's `pre_tokenizer` for one of llama.cpp's."""
    if known.steps == (GPT2,):
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False} for step in known.steps
    ]
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, plain]}
