"""A dialogue answers as if it read the whole conversation anew each time, and its commands do what they say."""

import io
import json
import shlex
from pathlib import Path

import pytest

from mlxlora import model
from mlxlora.chat import converse
from mlxlora.data import SamplesConfig
from mlxlora.data import load as load_data
from mlxlora.dialogue import COMMANDS, Dialogue
from mlxlora.errors import AdapterError, ConfigError
from mlxlora.generate import SamplingConfig, complete
from tests import tiny

SAMPLING = SamplingConfig(max_tokens=10)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_directory(tmp_path_factory.mktemp("dialogue") / "model", "qwen3")


@pytest.fixture
def dialogue(directory: Path, tmp_path: Path) -> Dialogue:
    loaded = model.load(directory)
    loaded.adapters.add(tiny.adapter_directory(tmp_path / "style", directory, size=2.0), name="style", scale=0.0)
    return Dialogue(loaded, SAMPLING)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])  # the second has windows, whose cache cannot always be cut
def test_keeping_the_cache_changes_no_answer(tmp_path: Path, family: str) -> None:
    talk = Dialogue(model.load(tiny.model_directory(tmp_path / "m", family)), SAMPLING, system="be kind")
    for question in ("hello", "what is the capital of France?", "thank you"):
        said = "".join(talk.say(question))
        assert said == complete(talk.model, talk.messages[:-1], SAMPLING).text
    talk.command("/undo")
    said = "".join(talk.say("and then?"))
    assert said == complete(talk.model, talk.messages[:-1], SAMPLING).text
    assert [message["role"] for message in talk.messages] == ["system", *["user", "assistant"] * 3]


def test_scales_take_effect_at_once(dialogue: Dialogue) -> None:
    before = "".join(dialogue.say("hello"))
    dialogue.command("/undo")
    assert "scale 1" in dialogue.command("/scale style 1")
    after = "".join(dialogue.say("hello"))
    assert before != after
    dialogue.command("/undo")
    answers = dialogue.compare("hello")
    assert answers == {"base": before, "style=1": after}
    assert dialogue.model.adapters.scales == {"style": 1.0} and not dialogue.messages


def test_saved_conversations_are_training_rows(dialogue: Dialogue, tmp_path: Path) -> None:
    path = tmp_path / "rows" / "good.jsonl"
    with pytest.raises(ConfigError, match="nothing to save"):
        dialogue.command(f"/save {path}")
    for _ in range(2):
        list(dialogue.say("two three"))
        told = dialogue.command(f"/save {path}")
        dialogue.command("/reset")
    words = ["mlxlora", "train", "--model", str(dialogue.model.path), "--data", str(path), "--out", "RUN"]
    assert "(2 rows)" in told and shlex.join(words) in told
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 and [m["role"] for m in rows[0]["messages"]] == ["user", "assistant"]
    assert len(load_data(path, dialogue.model.tokenizer, SamplesConfig(validation_split=0.0)).train) == 2


def test_an_interrupted_answer_is_kept_as_far_as_it_came(dialogue: Dialogue) -> None:
    answer = dialogue.say("hello")
    first = next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert dialogue.messages[-1] == {"role": "assistant", "content": first}
    assert "".join(dialogue.say("go on")) == complete(dialogue.model, dialogue.messages[:-1], SAMPLING).text


def test_wrong_commands_say_what_is_right(dialogue: Dialogue) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'scale'"):
        dialogue.command("/scal style 1")
    for wrong in ("/scale", "/scale style", "/scale style loud", "/save", "/compare", "/undo"):
        with pytest.raises(ConfigError):
            dialogue.command(wrong)
    with pytest.raises(AdapterError, match="Did you mean 'style'"):
        dialogue.command("/scale stile 1")
    with pytest.raises(AdapterError):
        dialogue.command("/scale style inf")
    assert all(command.usage in dialogue.command("/help") for command in COMMANDS.values())


def test_lines_in_answers_out(dialogue: Dialogue) -> None:
    out, err = io.StringIO(), io.StringIO()
    lines = ["hello", "", "/nothing", "/adapters", "/system be brief", "hi", "/exit", "never read"]
    converse(dialogue, lines, out, err)
    assert "style: lora" in out.getvalue() and "no command /nothing" in err.getvalue()
    assert [message["role"] for message in dialogue.messages] == ["system", "user", "assistant"]
