"""Code that comes with a model never runs unasked, whatever the way in; nobody is asked on stdin; asked for, it is
named, and lies inside the model's directory."""

import importlib
import inspect
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxlora import cli
from mlxlora.cli import VERBS
from mlxlora.errors import MlxLoraError
from mlxlora.serve import Server
from tests import tiny
from tests.faults import session

EVIL = """
from pathlib import Path
Path(__file__).with_name("it-ran").touch()
Path({marker!r}).touch()
from mlx_lm.models.qwen3 import Model, ModelArgs
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
"""


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def own_network(model: Path) -> None:
    edit(model / "config.json", model_file="evil.py")


def auto_model(model: Path) -> None:
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    edit(model / "config.json", auto_map=dict.fromkeys(names, "evil.Evil"), model_file="evil.py")


def own_tokenizer(model: Path) -> None:
    edit(
        model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil"
    )


def own_tokenizer_in_config(model: Path) -> None:
    edit(model / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoTokenizer": "evil.Evil"}, model_type="evil")


WAYS = [
    own_network,
    *(pytest.param(way, marks=pytest.mark.faults) for way in (auto_model, own_tokenizer, own_tokenizer_in_config)),
]


def bad_model(folder: Path, way: Any) -> Path:
    model = tiny.model_directory(folder / "model", "qwen3")
    (model / "evil.py").write_text(EVIL.format(marker=str(folder / "it-ran")))
    way(model)
    return model


def ran(folder: Path) -> bool:
    return any(folder.rglob("it-ran"))


def words_of(verb: str, model: Path, folder: Path) -> list[str] | None:
    """A command line for a verb that takes a model; None for one that takes none."""
    module, _, name = VERBS[verb].function.partition(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    if not {"model", "base", "source"} & set(parameters):
        return None
    rows = session.rows(folder / "rows.jsonl", 4)
    values = {
        "model": model, "base": model, "source": model, "data": rows, "prompt": "Hi", "out": folder / "out",
        "adapter": model, "to": "hf", "dequantize": "true", "repo": "me/x",
    }  # fmt: skip
    words = verb.split()
    for parameter in parameters.values():
        needed = parameter.default is inspect.Parameter.empty or parameter.name in (
            "model",
            "out",
            "dequantize",
        )
        if parameter.name in values and needed:
            flag = [] if parameter.name in VERBS[verb].positional else [f"--{parameter.name}"]
            words += [*flag, str(values[parameter.name])]
        if parameter.name == "sampling":
            words += ["--sampling.max_tokens", "4"]
        if parameter.name == "port":
            words += ["--port", "0"]
    return words


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_runs_it_or_asks(
    verb: str, way: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bad_model(tmp_path, way)
    words = words_of(verb, model, tmp_path)
    if words is None:
        pytest.skip("takes no model")
    answers = io.StringIO("y\n" * 2)
    monkeypatch.setattr(sys, "stdin", answers)
    monkeypatch.setattr(Server, "wait", lambda server: None)  # it would serve until Ctrl-C
    monkeypatch.setattr(logging, "raiseExceptions", False)  # transformers logs to the stderr of the test before
    code = cli.main(words)
    said = capsys.readouterr()
    assert not ran(tmp_path), "the model's code ran"
    if verb != "chat":  # whose stdin is the person's side of the talk
        assert answers.tell() == 0, "somebody read an answer from stdin"
    # a tokenizer that has a tokenizer.json beside its code is read from there, so some verbs may do their work
    allowed = (2,) if way is own_network and not verb.startswith("data") else (0, 1, 2)
    assert code in allowed and "Traceback" not in said.err, (words, code, said.err)
    assert code == 0 or not (tmp_path / "out").exists()


def test_with_leave_it_runs_and_only_from_inside(tmp_path: Path) -> None:
    from mlxlora import model as models

    model = bad_model(tmp_path, own_network)
    with pytest.raises(MlxLoraError, match=r"evil\.py"):
        models.load(model)
    assert not ran(tmp_path)
    models.load(model, trust_remote_code=True, lazy=True)
    assert ran(tmp_path)


def test_with_leave_a_tokenizer_runs_its_code_and_it_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mlxlora.tokenizer import Tokenizer

    model = bad_model(tmp_path, own_tokenizer)
    Tokenizer.load(model)
    assert not ran(tmp_path)
    assert not caplog.records
    Tokenizer.load(model, trust_remote_code=True)
    assert ran(tmp_path)
    assert str(model / "evil.py") in caplog.text


@pytest.mark.parametrize(
    "name", ["../outside.py", "/etc/passwd", "evil.txt", "nothing.py", "sub/../../outside.py", "link.py"]
)
def test_files_outside_the_model_are_refused_even_then(tmp_path: Path, name: str) -> None:
    from mlxlora import model as models

    model = bad_model(tmp_path, own_network)
    outside = tmp_path / "outside.py"
    outside.write_text((model / "evil.py").read_text())
    (model / "link.py").symlink_to(outside)
    edit(model / "config.json", model_file=name)
    with pytest.raises(MlxLoraError, match="model_file"):
        models.load(model, trust_remote_code=True)
    assert not ran(tmp_path)


@pytest.mark.parametrize("reference", ["someone/else--evil.Evil", "../outside.Evil", "nothing.Evil", 5])
def test_a_tokenizer_from_elsewhere_is_refused_even_then(tmp_path: Path, reference: Any) -> None:
    from mlxlora import model as models

    model = bad_model(tmp_path, own_tokenizer)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [reference, None]})
    with pytest.raises(MlxLoraError, match="auto_map"):
        models.load(model, trust_remote_code=True)
    assert not ran(tmp_path)
