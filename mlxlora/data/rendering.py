"""A conversation as text: what a chat template is given, and what it makes of it.

Training and generation write conversations in this one way, so that a model is asked in the words that it was trained
on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mlxlora.data.control import ControlTokens
from mlxlora.data.marker import unmarked
from mlxlora.data.records import Conversation
from mlxlora.data.template import ChatTemplate
from mlxlora.data.traits import Traits

Mark = Callable[..., str]  # what is done to each piece of text: see `Marker.mark`


class ChatRenderer:
    """Writes conversations with one template, given to it in the shape that it wants.

    traits: what the template was found to want
    """

    def __init__(self, template: ChatTemplate, control: ControlTokens) -> None:
        """control: the vocabulary's special tokens."""
        self.template = template
        self.traits = Traits.of(template, control)

    def text(self, conversation: Conversation, *, mark: Mark = unmarked, **variables: Any) -> str:
        """The conversation as the template writes it; `variables` (`add_generation_prompt`, …) are handed to it.

        Raises TemplateRefusal.
        """
        return self.template.render(self.messages(conversation, mark), conversation.tools, **variables)

    def messages(self, conversation: Conversation, mark: Mark = unmarked) -> list[dict[str, Any]]:
        """What the template is given; each piece of text goes through `mark`."""
        result = []
        for index, message in enumerate(conversation.messages):
            role = "system" if message.role == "developer" and not self.traits.developer else message.role
            item: dict[str, Any] = {"role": role}
            if message.role != "assistant":
                item["content"] = self.traits.content(mark(message.content, index, "other"))
            else:
                reasoning, parts = self.traits.style.arranged(message)
                if reasoning:
                    item["reasoning_content"] = item["thinking"] = mark(reasoning, index, "thinking")
                inline = mark(parts.thinking, index, "thinking", parts.before)
                content = parts.before + inline + parts.between + mark(parts.answer, index, "answer")
                item["content"] = self.traits.content(content)
                if message.tool_calls:
                    item["tool_calls"] = [self._call(call, index, mark) for call in message.tool_calls]
            if message.name is not None:
                item["name"] = message.name
            if message.tool_call_id is not None:
                item["tool_call_id"] = message.tool_call_id
            result.append(item)
        return result

    def _call(self, call: dict[str, Any], index: int, mark: Mark) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        if self.traits.text_arguments:
            arguments = json.dumps(arguments, ensure_ascii=False)
        return call | {"function": {"name": mark(function["name"], index, "call"), "arguments": arguments}}
