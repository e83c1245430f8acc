"""What is asked while a model learns: held-out prompts that are quickly read, always the same ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxlora import answers
from mlxlora.answers import Answers, chosen
from mlxlora.data import SamplesConfig, load
from mlxlora.model import LanguageModel
from mlxlora.model import load as load_model
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(tiny.model_directory(tmp_path_factory.mktemp("answers") / "model", "llama"))


def test_a_few_short_samples_spread_over_all(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [5, 900, 5, 5, 900, 5, 900, 5]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "dog " * size}) + "\n" for size in lengths))
    data = load(tmp_path / "rows.jsonl", model.tokenizer, SamplesConfig(validation_split=0)).train
    monkeypatch.setattr(answers, "LONGEST", 100)
    assert chosen(data) == [0, 3, 7]
    assert chosen(data.subset([1, 0])) == [1]
    assert chosen(data.subset([1, 4])) == [0, 1]  # nothing shorter is there


def test_a_text_is_gone_on_with_from_its_beginning(model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "the lazy dog jumps over the fence"}) + "\n")
    data = load(tmp_path / "rows.jsonl", model.tokenizer, SamplesConfig(validation_split=0)).train
    said = Answers(model, data)(7)
    assert said.step == 7 and len(said.answers) == 1
    assert said.prompts[0] and said.expected[0]
    assert f"{said.prompts[0]} {said.expected[0]}".split() == ["the", "lazy", "dog", "jumps", "over", "the", "fence"]


def test_a_conversation_is_asked_up_to_its_last_answer(model: LanguageModel, tmp_path: Path) -> None:
    tiny.chats(tmp_path / "rows.jsonl", 1)
    messages = json.loads((tmp_path / "rows.jsonl").read_text())["messages"]
    data = load(tmp_path / "rows.jsonl", model.tokenizer, SamplesConfig(validation_split=0)).train
    said = Answers(model, data)(0)
    assert said.expected == [messages[-1]["content"].strip()] and messages[-1]["content"] not in said.prompts[0]
