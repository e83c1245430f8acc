"""Wrong words on the command line: one message that a beginner can read, exit code 2, nothing written."""

import re
from pathlib import Path

import pytest

from mlxlora import cli, flags
from mlxlora.cli import VERBS
from mlxlora.errors import ConfigError
from tests.options.calls import parser_of

WRONG = {"int": "x", "float": "x", "bool": "maybe", "Literal": "nosuch", "dict": "x", "tuple": "0.9"}
TRAIN = "train --model m --data d --out o"


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    code = cli.main(words)
    said = capsys.readouterr()
    assert code == 2 and not said.out, (words, code, said)
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    python = r"Expected an?|Union|NoneType|Literal|typing|Parser key|<class|Traceback|\bint\b|\bstr\b|\bdict\b|\bdot\b"
    assert not re.search(python, said.err), said.err
    return said.err


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "doctor"])
def test_every_option_of_a_kind_says_which_kind(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each option with a value that is none, and with an empty one."""
    parser, _ = parser_of(verb)
    tried = 0
    for flag, action in parser._option_string_actions.items():
        kind = flags.kind_of(action)
        found = next((name for name in WRONG if re.search(rf"\b{name}\b", kind)), None)
        if found is None or "Options" in kind or flag.endswith("+"):
            continue
        shown = refused(capsys, [*verb.split(), f"{flag}={WRONG[found]}"])
        assert f"{flag} is {WRONG[found]}, but must be " in shown, shown
        assert f"{flag} is empty. Give " in refused(capsys, [*verb.split(), f"{flag}="])
        tried += 1
    assert tried or verb in ("import", "report", "completion")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (f"{TRAIN} --adapter.rank x", "--adapter.rank is x, but must be a whole number."),
        (f"{TRAIN} --adapter.layers x", "must be a list such as [1, 2] or a whole number or all."),
        (f"{TRAIN} --adapter.rank_pattern [1]", "must be names with values, such as '{name: value}'."),
        (f"{TRAIN} --samples.packing maybe", "--samples.packing is maybe, but must be true or false."),
        (f"{TRAIN} --samples.thinking x", "must be one of keep, mask, strip."),
        (f"{TRAIN} --samples file.yaml", "--samples is a group of options. Give them one by one (--samples.max_length"),
        (f"{TRAIN} --adapter", "--adapter is a group of options."),
        ("export --model m --to gguf --out o.gguf --gguf q8_0", "--gguf is a group of options."),
        (
            "export --model m --to ollama --out o --ollama.date yesterday",
            "must be a date such as 2026-01-31, not 'yest",
        ),
        ('export --model m --to ollama --out o --ollama.system a"""b', "must not contain"),
        (f"{TRAIN} --report_to nosuch", "There are: tensorboard, wandb, swanlab, trackio."),
        (f"{TRAIN} --training.seed 99999999999999999999", "must be from 0 to below 2**63"),
        (f"{TRAIN} --config", "--config needs a value."),
        (f"{TRAIN} --training.steps", "--training.steps needs a value."),
        (f"{TRAIN} --memory_limit=", "--memory_limit is empty. Give a value, or leave it out."),
        (f"{TRAIN} stray", "unexpected: stray."),
        ("upload run --repo a/b --private maybe", "--private is maybe, but must be true or false."),
        ("completion tcsh", "SHELL is tcsh, but must be one of bash, zsh, fish."),
        ("generate --model m --prompt=", "The prompt is empty."),
        ("serve --model m --host=", "--host is empty."),
        ("serve --model m --origins localhost:3000", "no origin"),
        ("compare --model m --adapter a --data d --harness_limit 3", "given with --harness"),
        ("compare --model m --adapter a --data d --harness boolq --harness_limit 0", "1 or more"),
        ("fuse --model m --adapter a --out o --max_kl .nan", "max_kl is nan"),
        ("demo --seed -1", "seed is -1"),
        ("data check d --model m --show -1", "show is -1"),
        ("data check d --model m --batch_size 0", "batch_size is 0"),
        ("data check d --model m --html rows.jsonl", "ends in .html"),
        ("report run --out rows.jsonl", "ends in .html"),
    ],
)
def test_messages(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, words.split())


@pytest.mark.parametrize("verb", [verb for verb, found in VERBS.items() if found.positional])
def test_an_empty_word_is_not_the_current_directory(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{VERBS[verb].positional[0].upper()} is empty." in refused(capsys, [*verb.split(), ""])


@pytest.mark.parametrize(
    "words",
    [
        ["demo"], ["convert", "--model", "m"], ["tune", "--model", "m", "--data", "d"],
        ["train", "--model", "m", "--data", "d"], ["compare", "--model", "m", "--adapter", "a", "--data", "d"],
        ["fuse", "--model", ".", "--adapter", "a"], ["merge", "a", "b"], ["export", "--model", "m", "--to", "hf"],
        ["import", "a", "--format", "peft"], ["data", "check", "d", "--model", "m"], ["report", "run"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_place_below_a_file_is_refused_before_the_work(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    flag = "--html" if words[0] == "data" else "--out"
    shown = refused(capsys, [*words, flag, str(tmp_path / "file" / "new.html")])
    assert f"{tmp_path / 'file'} is a file" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("text", ["# Rules", "##", "~", "&a", "yes", "12", "a: b", "[1", "'", "é😀", " x ", "!!x y"])
def test_texts_arrive_as_they_are(text: str) -> None:
    """YAML reads some of them as no value at all, as a number or as a truth; a person meant a text."""
    words = ["--model", text, "--prompt", text, "--system", text, "--adapter", text, "other", "--sampling.stop", text]
    parser, _ = parser_of("generate")
    given = flags.parse(parser, flags.normalise(parser, words))
    assert (given["model"], given["prompt"], given["system"]) == (text, text, text)
    assert given["adapter"] == [text, "other"] and given["sampling"].stop == [text]


@pytest.mark.parametrize("text", ["# Rules", "~", "yes", "12", "a: b", "[1", "'", "{x: 1}", "- a", "é😀\n \\n", ""])
def test_texts_of_a_group_that_may_be_left_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("ollama: {type: f16, system: other}\n")
    parser, _ = parser_of("export")
    words = ["--config", str(tmp_path / "c.yaml"), "--model", "m", "--to", "ollama", "--out", "o"]
    given = flags.parse(parser, flags.normalise(parser, [*words, "--ollama.system", text, "--ollama.template", "gguf"]))
    assert (given["ollama"].system, given["ollama"].type, given["ollama"].template) == (text, "f16", "gguf")


def test_switches_of_a_group_that_may_be_left_out() -> None:
    parser, _ = parser_of("export")
    words = ["--model", "m", "--to", "mlx", "--out", "o"]
    for given in (["--mlx.dequantize"], ["--mlx.dequantize", "--adapter", "a"], ["--mlx.dequantize", "true"]):
        assert flags.parse(parser, flags.normalise(parser, [*words, *given]))["mlx"].dequantize is True
    assert flags.parse(parser, flags.normalise(parser, [*words, "--mlx.dequantize=false"]))["mlx"].dequantize is False
    for wrong, said in (
        (["--mlx.bits"], "--mlx.bits needs a value"),
        (["--mlx.bits", ""], "--mlx.bits is empty"),
        (["--mlx.bit"], "unknown option --mlx.bit. Did you mean 'mlx.bits'"),
    ):
        with pytest.raises(ConfigError, match=said):
            flags.normalise(parser, [*words, *wrong])


def test_what_stands_without_a_flag_is_not_called_unknown_with_one() -> None:
    parser, _ = parser_of("merge")
    with pytest.raises(ConfigError, match=r"^--adapter: ADAPTER stands without a flag"):
        flags.parse(parser, flags.normalise(parser, ["--adapter", "a", "b", "--out", "o"]))


def test_one_value_of_a_list_of_numbers_is_a_list() -> None:
    parser, _ = parser_of("tune")
    given = flags.parse(
        parser, flags.normalise(parser, ["--model", "m", "--data", "d", "--out", "o", "--search.ranks", "4"])
    )
    assert given["search"].ranks == [4]


def test_a_switch_before_words_without_a_flag_takes_none_of_them() -> None:
    parser, _ = parser_of("merge")
    given = flags.parse(parser, flags.normalise(parser, ["--any_base", "a", "b", "--out", "o"]))
    assert given["any_base"] is True and given["adapter"] == ["a", "b"]
