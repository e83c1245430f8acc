"""Chat templates of real families with `{% generation %}` around what the assistant says, and their tokenizers.

Written apart from the templates in `mlxlora/data/templates`, so that the two can be held against each other: transformers
computes the mask of the marked ones (`return_assistant_tokens_mask`).
"""
# ruff: noqa: E501 - templates are as long as they are

from __future__ import annotations

import functools
from typing import Any

G, E = "{% generation %}", "{% endgeneration %}"

CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    + G + "{{ m.content + '<|im_end|>' }}" + E
    + "{{ '\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)  # fmt: skip
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content|trim %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' }}"
    "{{ strftime_now('%d %b %Y') + '\n\n' + s + '<|eot_id|>' }}"
    "{% for m in rest %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}" + G + "{{ m.content|trim + '<|eot_id|>' }}" + E
    + "{% else %}{{ m.content|trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
)  # fmt: skip
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content|trim + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}"
    + G + "{{ m.content|trim + '<end_of_turn>' }}" + E
    + "{{ '\n' }}{% else %}{{ '<start_of_turn>user\n' + (s if loop.first else '') + m.content|trim + '<end_of_turn>\n' }}"
    "{% endif %}{% endfor %}"
)  # fmt: skip
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'assistant' %}{{ ' ' }}" + G + "{{ m.content|trim + eos_token }}" + E
    + "{% else %}{{ '[INST] ' + (s if loop.revindex <= 2 else '') + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)  # fmt: skip
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
    + G + "{{ m.content + '<|end|>' }}" + E + "{{ '\n' }}{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{{ eos_token }}"
)  # fmt: skip
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
    + G + "{{ m.content + eos_token }}" + E + "{{ '\n' }}{% else %}{{ m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
)  # fmt: skip
QWEN3 = (
    "{% set ns = namespace(q=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.q = loop.index0 %}{% endif %}"
    "{% endfor %}{% if tools %}{{ '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' "
    "else '') + '# Tools\n\nYou may call one or more functions to help.\n\nTheir signatures, within <tools></tools>:\n"
    "<tools>' }}{% for t in tools %}{{ '\n' + t|tojson }}{% endfor %}{{ '\n</tools>\n\nFor each call, return JSON within "
    '<tool_call></tool_call>:\n<tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call><|im_end|>\n\' }}'
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif m.role == 'assistant' %}{% set why = '' %}{% set c = m.content or '' %}{% if m.reasoning_content %}"
    "{% set why = m.reasoning_content %}{% elif '</think>' in c %}"
    "{% set why = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}" + G
    + "{% if loop.index0 > ns.q and (loop.last or why) %}{{ '<think>\n' + why.strip('\n') + '\n</think>\n\n' }}"
    "{% set c = c.lstrip('\n') %}{% endif %}{{ c }}{% for t in m.tool_calls or [] %}"
    "{{ ('\n' if c or not loop.first else '') + '<tool_call>\n{\"name\": \"' + t.function.name + '\", \"arguments\": ' "
    "+ t.function.arguments|tojson + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>' }}" + E + "{{ '\n' }}"
    "{% endif %}{% endfor %}"
)  # fmt: skip
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' }}{% set c = m.content %}"
    "{% if '</think>' in c and not loop.last %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if c.startswith('<think>\n') %}{{ '<think>\n' }}{% set c = c[8:] %}{% endif %}"
    + G + "{{ c + '<｜end▁of▁sentence｜>' }}" + E + "{% endif %}{% endfor %}"
)  # fmt: skip
HARMONY = (
    "{{ '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. "
    "Channel must be included for every message.<|end|>' }}"
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions.' + m.name + ' to=assistant<|channel|>commentary<|message|>' "
    "+ m.content|tojson + '<|end|>' }}"
    "{% elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% else %}"
    "{{ '<|start|>assistant' }}" + G + "{% if m.thinking and (loop.last or m.tool_calls) %}"
    "{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}{% if m.tool_calls %}"
    "{% set c = m.tool_calls[0].function %}{{ ' to=functions.' + c.name + '<|channel|>commentary json<|message|>' "
    "+ c.arguments|tojson + '<|call|>' }}{% else %}{{ '<|channel|>final<|message|>' + m.content "
    "+ ('<|return|>' if loop.last else '<|end|>') }}{% endif %}" + E + "{% endif %}{% endfor %}"
)  # fmt: skip

MARKED = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "gemma": (GEMMA, "<eos>"),
    "mistral": (MISTRAL, "</s>"),
    "phi3": (PHI3, "<|endoftext|>"),
    "zephyr": (ZEPHYR, "</s>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "deepseek-r1": (R1, "<｜end▁of▁sentence｜>"),
    "harmony": (HARMONY, "<|return|>"),
}
"""Template with marks and end-of-text token, by the name under which mlxlora knows the family."""

CONTROL = [
    "<unk>", "<s>", "</s>", "<eos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|system|>", "<|user|>",
    "<|assistant|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<|start|>", "<|channel|>",
    "<|message|>", "<|return|>", "<|call|>",
]  # fmt: skip
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added to the vocabulary, but not special (Qwen3)
TEXT = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital of France.",
    "user assistant system question answer hello thank you please Hi Hello Bye now and because why not then",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 東京は日本の首都です。 Привет, мир! 🙂",
    '{"name": "weather", "arguments": {"city": "Paris"}}   \n\n  def f(x):\n    return x',
]


@functools.cache
def backend(kind: str) -> str:
    """A trained tokenizer as JSON: `bytes` (GPT-2, Llama 3, Qwen), `metaspace` (Gemma, Llama 2 as transformers 5 makes
    it), `prepend` (Llama 2's older file: a normalizer that writes ▁) or `unigram` (T5, XLM-R: with a normalizer that
    changes the text)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    control = [AddedToken(text, special=True, normalized=False, rstrip=text == "<|assistant|>") for text in CONTROL]
    if kind == "unigram":
        built = Tokenizer(models.Unigram())
        built.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
        built.pre_tokenizer = pre_tokenizers.Metaspace()
        built.decoder = decoders.Metaspace()
        built.train_from_iterator(
            TEXT * 4,
            trainers.UnigramTrainer(vocab_size=400, special_tokens=control, unk_token="<unk>", show_progress=False),
        )
        return built.to_str()
    alphabet = sorted({letter for text in TEXT for letter in text.replace(" ", "▁")})
    if kind == "bytes":
        built = Tokenizer(models.BPE())
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
        built.post_processor = processors.ByteLevel(trim_offsets=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        fallback: list[str] = []
    else:
        built = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        built.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        if kind == "metaspace":
            built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        fallback = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*control, *fallback], initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(TEXT * 4, trainer)
    if fallback:  # trained as special tokens so as to be in the vocabulary; a real file has them as plain pieces
        import json

        state = json.loads(built.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in fallback]
        built = Tokenizer.from_str(json.dumps(state))
    built.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN])
    return built.to_str()


def hf_tokenizer(kind: str, template: str | None, eos: str) -> Any:
    """A transformers tokenizer over one of the trained backends."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend(kind)), bos_token="<s>", eos_token=eos, unk_token="<unk>"
    )
    made.chat_template = template
    return made
