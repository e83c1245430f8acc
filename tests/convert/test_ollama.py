"""Chat templates in Ollama's language: rendered in Go's, they write what Jinja writes; others are refused."""

import datetime
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxlora.data import known_templates
from mlxlora.data.template import ChatTemplate
from mlxlora.errors import ConfigError, UnsupportedError
from mlxlora_convert import go_template
from mlxlora_convert.ollama import export_ollama
from mlxlora_convert.ollama_options import OllamaOptions
from mlxlora_convert.ollama_template import render, translate
from tests import tiny

DATE = datetime.date(2024, 7, 26)
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
LOOP = "{{ bos_token }}{% for m in messages %}"
TEMPLATES = {
    "llama 2": LOOP
    + "{% if m.role == 'system' %}[INST] <<SYS>>\n{{ m.content }}\n<</SYS>>\n\n{% elif m.role == 'user' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'system' %}[INST] {% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s><s>{% endif %}{% endfor %}",
    "mistral v3, system last": LOOP
    + "{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}",
    "gemma 2, no system": LOOP
    + "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "vicuna": "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}"
    "USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}ASSISTANT:",
    "alpaca": "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n{% elif m.role == "
    "'assistant' %}### Response:\n{{ m.content }}\n\n{% else %}{{ m.content }}\n\n"
    "{% endif %}{% endfor %}### Response:\n",
    "chatml with a default system prompt": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind."
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n",
    "granite": "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n"
    "{% endfor %}<|start_of_role|>assistant<|end_of_role|>",
    "olmo 2": LOOP + "{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content + eos_token + '\n' }}{% else %}"
    "<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}{% if loop.last and add_generation_prompt %}<|assistant|>\n"
    "{% endif %}{% endfor %}",
    "command r": LOOP + "<|START_OF_TURN_TOKEN|><|{{ {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}"
    "[m.role] }}_TOKEN|>{{ m.content }}<|END_OF_TURN_TOKEN|>{% endfor %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "a brace before the message": "{% for m in messages %}{{ m.role }} {{ '{' }}{{ m.content }}}\n{% endfor %}go:",
    "braces in the text": "{% for m in messages %}{{ '{{' }}{{ m.role }}: \"{{ m.content }}\"\\n{{ '}}' }}\n"
    "{% endfor %}go:",
}  # fmt: skip
TEMPLATES |= {name: known_templates.named_template(name) for name in known_templates.template_names()}
CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "Hi")],
    [("system", "Be brief.\nVery."), ("user", "Hi")],
    [("user", "One?"), ("assistant", "1.\n\n2."), ("user", "Zwei {{ x }}?")],
    [("system", "S"), ("user", "One?"), ("assistant", "1"), ("user", "2?"), ("assistant", "'2'"), ("user", '"3"?')],
]


def translated(name: str, bos: str) -> Iterator[tuple[str, list[dict[str, str]], str]]:
    """Go's template, a conversation that it can say, and what Jinja makes of that."""
    text, pattern = translate(TEMPLATES[name], VARIABLES, bos=bos, date=DATE)
    assert (pattern.system is None) == (name == "gemma 2, no system")
    jinja = ChatTemplate(TEMPLATES[name], VARIABLES, date=DATE)
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        if messages[0]["role"] != "system" or pattern.system is not None:
            yield text, messages, jinja.render(messages, add_generation_prompt=True).removeprefix(bos)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("bos", ["", "<s>"])
def test_go_writes_what_jinja_writes(name: str, bos: str) -> None:
    for text, messages, expected in translated(name, bos):
        assert render(text, messages) == expected


def test_a_date_must_be_said() -> None:
    for name in ("llama3", "harmony"):
        with pytest.raises(UnsupportedError, match=r"today's date.*--ollama\.date"):
            translate(TEMPLATES[name], VARIABLES)
    text, _ = translate(TEMPLATES["llama3"], VARIABLES, date=datetime.date(2026, 1, 31))
    assert "Today Date: 31 Jan 2026" in text


REFUSED = {
    "answers are left out": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "turns are numbered": "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}>",
    "a message twice": "{% for m in messages %}{{ m.content }} {{ m.content }}\n{% endfor %}>",
    "out of order": "{% for m in messages | reverse %}{{ m.content }}\n{% endfor %}>",
    "the content is changed": "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}>",
    "quotes are escaped": "{% for m in messages %}[{{ m.content | tojson }}]\n{% endfor %}>",
    "the length counts": "{{ messages | length }}{% for m in messages %}{{ m.content }}\n{% endfor %}>",
    "it refuses everything": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_translated_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"--ollama\.template gguf"):
        translate(REFUSED[name], VARIABLES)


VALUES = {"A": "y", "B": True, "C": "", "N": 1, "L": ["p", "q"]}
LANGUAGE = [
    ("a {{- 1 }} b", "a1 b"),
    ("a {{ 1 -}} b", "a 1b"),
    ('{{ if eq .A "x" }}1{{ else if .B }}2{{ else }}3{{ end }}', "2"),
    ("{{ range $i, $x := .L }}{{ $i }}={{ $x }}{{ . }};{{ end }}", "0=pp;1=qq;"),
    ("{{ $n := 0 }}{{ range .L }}{{ $n = . }}{{ end }}{{ $n }}", "q"),
    ("{{ range .L }}{{ $.A }}{{ end }}", "yy"),
    ("{{ len (slice .L 1) }}", "1"),
    ('{{ if and .B (not .C) (ne .A "x") }}ok{{ end }}', "ok"),
    (r'{{ "a\n\"b\" \\ {" }}', 'a\n"b" \\ {'),
    ('{{ eq .A "x" "y" }}', "true"),
    ("{{ range slice .L 2 }}a{{ else }}b{{ end }}", "b"),
    ("a\u00a0 {{- 1 -}} \u3000b", "a\u00a01\u3000b"),
]


@pytest.mark.parametrize(("source", "expected"), LANGUAGE)
def test_the_go_template_language(source: str, expected: str) -> None:
    assert go_template.render(source, VALUES) == expected


@pytest.mark.parametrize(
    "source", ["{{ if .A }}", "{{ end }}", "{{ printf .A }}", "{{ $x = 1 }}", "{{ .A | len }}", "{{ len .A }}"]
)
def test_what_is_not_known_of_the_language_is_an_error(source: str) -> None:
    with pytest.raises(go_template.GoTemplateError):
        go_template.render(source, {"A": "y"})


def read_modelfile(text: str) -> dict[str, list[str]]:
    """A Modelfile's commands as Ollama's own parser reads them: a name, then a text quoted in three or one or none."""
    found: dict[str, list[str]] = {}
    for name, long, short, bare in re.findall(
        r'(?ms)^([A-Z]+) (?:(?:stop )?(?:"""(.*?)"""|"([^"\n]*)")|([^\n]*))$', text
    ):
        found.setdefault(name, []).append(long or short or bare)
    return found


def test_the_modelfile(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "qwen3")
    (directory / "LICENSE").write_text("Do as you like.\n")
    (directory / "generation_config.json").write_text(
        '{"eos_token_id": 2, "temperature": 0.6, "top_k": 20, "do_sample": true}'
    )
    (tmp_path / "out").mkdir()
    done = export_ollama(directory, tmp_path / "out", OllamaOptions(system='Say "hi".', type="f16"))
    found = read_modelfile((tmp_path / "out" / "Modelfile").read_text())
    assert found["FROM"] == ["./model.gguf"] and (tmp_path / "out" / "model.gguf").is_file()
    assert found["SYSTEM"] == ['Say "hi".'] and found["LICENSE"] == ["Do as you like."]
    assert found["PARAMETER"] == ["<|im_end|>", "<|im_start|>", "temperature 0.6", "top_k 20"]
    messages = [{"role": "user", "content": "Hi"}]
    assert render(found["TEMPLATE"][0], messages) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert done.modelfile.startswith("FROM ./model.gguf\nTEMPLATE")


def test_the_template_may_be_left_to_the_file(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama", template=REFUSED["turns are numbered"])
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedError, match=r"--ollama\.template gguf"):
        export_ollama(directory, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    done = export_ollama(directory, tmp_path / "out", OllamaOptions(template="gguf"))
    assert done.modelfile == "FROM ./model.gguf\n"


def test_a_model_without_a_template(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama", template=None)
    (tmp_path / "out").mkdir()
    done = export_ollama(directory, tmp_path / "out")
    assert "TEMPLATE" not in done.modelfile and "no chat template" in done.notes[0]


@pytest.mark.parametrize("wrong", [{"type": "q9"}, {"template": "x"}, {"system": 'a"""b'}, {"date": "31.1.2026"}])
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OllamaOptions(**wrong)
