"""Chat templates are hostile input: the sandbox holds, time and memory are bounded; good ones render as elsewhere."""
# ruff: noqa: E501 - one line a template

from __future__ import annotations

import itertools
import time

import pytest

from mlxlora.data.known_templates import named_template, template_names
from mlxlora.data.template import ChatTemplate, TemplateRefusal
from mlxlora.errors import ConfigError, ModelError

DEEP = "{% for a in [0,0,0,0,0,0,0,0,0,0] %}" * 12 + "{% endfor %}" * 12
NEST = "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(90) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}"
BIG = "('a' * 90000 * 40)"
HOSTILE = {
    "reaching into Python": "{{ ''.__class__.__mro__ }}",
    "through a global": "{{ messages.__init__.__globals__ }}",
    "through a namespace": "{% set ns = namespace(_x=1) %}",
    "changing what it is given": "{{ messages.append(1) }}",
    "another template": "{% include '/etc/passwd' %}",
    "importing": "{% import 'os' as os %}",
    "endless loops": DEEP,
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "long recursion of two": "{% macro f(n) %}{% for i in range(9) %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}{{ f(90) }}",
    "a string repeated": "{{ 'a' * 10000000000 }}",
    "a list repeated": "{{ ['a' * 90000] * 90000 }}",
    "a string doubled": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a string doubled otherwise": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a list doubled": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "padding": "{{ 'a'.ljust(10000000000) }}",
    "padding by format": "{{ '{:>10000000000}'.format(1) }}",
    "padding by percent": "{{ '%10000000000d' % 1 }}",
    "padding by a starred percent": "{{ '%*d' % (10000000000, 1) }}",
    "replacing": "{{ ('a' * 90000).replace('', 'b' * 90000) }}",
    "replacing by a filter": "{{ ('a' * 90000) | replace('a', 'b' * 90000) }}",
    "joining": "{{ (['a' * 90000] * 90000) | join }}",
    "joining by a method": "{{ ''.join(['a' * 90000] * 90000) }}",
    "indenting": "{{ ('a\n' * 90000) | indent(90000) }}",
    "writing out": "{{ (['a' * 90000] * 90000) | tojson }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "much output": "{% for i in range(90000) %}{{ 'a' * 90000 }}{% endfor %}",
    "much captured output": "{% set x %}{% for i in range(90000) %}{{ 'a' * 90000 }}{% endfor %}{% endset %}",
    "a number squared": "{% set n = namespace(x=9) %}{% for i in range(90) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a list in itself, written out": NEST + "{{ n.x | tojson }}",
    "a list in itself, compared": NEST + "{{ n.x == n.y }}",
    "a list in itself, looked for": NEST + "{{ n.x in [n.y] }}",
    "a list in itself, tested": NEST + "{{ n.x is eq(n.y) }}",
    "a tuple in itself, as a key": NEST.replace("[", "(").replace("]", ",)") + "{{ {n.x: 1} }}",
    "lists added up": "{{ ([range(90000) | list] * 90000) | sum(start=[]) | length }}",
    "a range joined": "{{ (range(90000) | join(BIG)) | length }}",
    "letters joined": "{{ BIG.join(BIG) | length }}",
    "letters joined lazily": "{{ BIG.join(BIG | map('upper')) | length }}",
    "tabs": "{{ ('\t' * 90000).expandtabs(90000) }}",
    "letters translated": "{{ BIG.translate({97: BIG}) }}",
    "bytes repeated": "{{ 'a'.encode() * 90000 * 90000 }}",
    "bytes of a number": "{{ (5).to_bytes(90000, 'big') }}",
    "many fields": "{{ ('{0:>999}' * 90000).format('x') }}",
    "many fields by percent": "{{ ('%(a)999d' * 90000) % {'a': 1} }}",
    "many fields by a filter": "{{ ('%(a)s' * 90000) | format(a=BIG) }}",
    "fields of a view": "{{ ('{0}' * 90000).format({'a': BIG}.values()) }}",
    "wide JSON": "{{ (range(90000) | list) | tojson(separators=(BIG, ':')) }}",
    "strings kept": "{% set n = namespace(x=[]) %}{% for i in range(90000) %}{% set n.x = n.x + [BIG ~ i] %}{% endfor %}",
    "lists kept": "{% set n = namespace(x=[]) %}{% for i in range(90000) %}{% set n.x = n.x + [(BIG ~ i) | list] %}{% endfor %}",
    "slices kept": "{% set n = namespace(x=[]) %}{% for i in range(90000) %}{% set n.x = n.x + [BIG[1:]] %}{% endfor %}",
    "characters taken away": "{{ BIG.strip(BIG ~ 'b') }}",
    "characters trimmed": "{{ BIG | trim(BIG ~ 'b') }}",
    "a condition of a loop": NEST.replace("90", "17") + "{% for i in range(90000) if n.x != n.y %}{% endfor %}",
    "many dates": "{{ strftime_now('%c' * 90000) }}",
    "a wide date": "{{ strftime_now('%9999999Y') }}",
    "a large range": "{{ range(10000000000) | list }}",
}  # fmt: skip


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_templates_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxlora.data.sandbox.SECONDS", 0.5)
    begin = time.process_time()
    with pytest.raises((TemplateRefusal, ModelError)):
        ChatTemplate(HOSTILE[name].replace("BIG", BIG)).render([{"role": "user", "content": "x"}])
    assert time.process_time() - begin < 5


def test_a_template_that_is_too_slow_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be as slow for every other row."""
    monkeypatch.setattr("mlxlora.data.sandbox.SECONDS", 0.1)
    with pytest.raises(ModelError, match="takes longer than"):
        ChatTemplate(DEEP).render([])


def test_a_process_that_was_stopped_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=1000)
    monkeypatch.setattr("mlxlora.data.bounds.time.monotonic", lambda: next(clock))
    assert ChatTemplate("{% for i in range(9) %}{{ i }}{% endfor %}").render([]) == "012345678"


@pytest.mark.parametrize("source", ["{{ '{0.__class__}'.format(messages) }}", "{{ messages | attr('__class__') }}"])
def test_python_stays_out_of_reach(source: str) -> None:
    assert ChatTemplate(source).render([]) == ""


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% endif %}", "{{ 1 | nothing }}", "{" * 2_000_000])
def test_invalid_templates_are_model_errors(source: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate(source)


def test_what_a_template_says_by_raise_exception_is_passed_on() -> None:
    with pytest.raises(TemplateRefusal, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render([])


def test_expressions_mean_what_they_mean_elsewhere() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% set ns.s = ns.s ~ m.content ~ ns.n %}{{ m['content'] + '|' + m.role }}"
        "{{ loop.index0 + 1 - 1 }}{% endfor %}\n    {%- generation %}g{% endgeneration %}{{ ns.s }}{{ 1 + 2.5 }}"
        "{{ ([1] + [2]) | join('-') }}{{ tools | tojson if tools else 'none' }}{{ {'a': '<é>'} | tojson(indent=2) }}"
        "{{ 'a,b'.split(',')[-1] ~ (3 | string) ~ true ~ none }}{{ 'x' if add_generation_prompt }}{{ bos_token }}"
        "{% macro f(a) %}[{{ a }}]{% endmacro %}{{ f('q') + f('r') }}{{ dict(a=1).items() | list }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}"
        "{{ '%s-%s' % ('a', 'b') }}{{ '{}'.format(3) }}{{ 'abc'[::-1] }}{% break %}" "{{ ' pad '|trim }}"
    ).replace("{% break %}", "")  # fmt: skip
    messages = [
        {"role": "user", "content": "one"},
        {"role": "tool", "content": "t"},
        {"role": "user", "content": "two"},
    ]
    values = {"bos_token": "<s>"}
    expected, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **values)
    assert ChatTemplate(source, values).render(messages, add_generation_prompt=True) == expected[0]


def test_known_templates() -> None:
    assert {"chatml", "llama3", "gemma", "mistral", "phi3", "qwen3", "deepseek-r1", "zephyr", "harmony"} <= {
        *template_names()
    }
    for name in template_names():
        assert (
            ChatTemplate(named_template(name), {"bos_token": "<s>", "eos_token": "</s>"})
            .render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
            .count("Hello")
            == 1
        )
    with pytest.raises(ConfigError, match="Did you mean 'chatml'"):
        named_template("chatlm")
