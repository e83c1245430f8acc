"""Chat templates: Jinja programs that come with a model, so they run in a sandbox.

The variables and filters are those of transformers' `apply_chat_template`; `strftime_now` answers with one fixed date,
so that the same data gives the same tokens tomorrow.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2

from mlxlora.data.bounds import TooSlow
from mlxlora.data.sandbox import SECONDS, Sandbox
from mlxlora.errors import ModelError

SOURCE_CHARACTERS = 256 * 1024


class TemplateRefusal(Exception):
    """A template refused a conversation, or could not render it; the message says why."""


class ChatTemplate:
    """A compiled chat template.

    >>> ChatTemplate("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", {"eos_token": "</s>"}).render(
    ...     [{"role": "user", "content": "Hi"}])
    'Hi</s>'
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str] | None = None,
        *,
        date: datetime.date = datetime.date(2024, 7, 26),
    ) -> None:
        """Compile `source`. `variables` are bos_token and the like; `date` is what `strftime_now` formats.

        Raises ModelError when the source is no valid template.
        """
        if len(source) > SOURCE_CHARACTERS:
            raise ModelError(
                f"the chat template is {len(source):,} characters long; {SOURCE_CHARACTERS:,} are allowed."
            )
        self.source = source
        self.variables = dict(variables or {})
        self.date = date
        self._sandbox = Sandbox(date)
        try:
            self._template = self._sandbox.compiled(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}.") from None
        except (RecursionError, MemoryError, ValueError, TypeError, TooSlow) as error:
            raise ModelError(f"the chat template cannot be compiled: {type(error).__name__}.") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Raises TemplateRefusal when the template raises, fails, or makes too much of this conversation; ModelError when
        it takes too long, which the next conversation would only repeat.
        """
        values = {
            **self.variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        try:
            return self._sandbox.rendered(self._template, values)
        except TooSlow:
            raise ModelError(
                f"the chat template takes longer than {SECONDS:g} seconds for one conversation. Choose another by "
                "--samples.template."
            ) from None
        except jinja2.TemplateError as error:
            raise TemplateRefusal(error.message or type(error).__name__) from None
        except RecursionError:
            raise TemplateRefusal("the template calls itself without end") from None
        except Exception as error:
            raise TemplateRefusal(f"{type(error).__name__}: {error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the source, its variables and the date."""
        known = json.dumps([self.source, self.variables, self.date.isoformat()], sort_keys=True)
        return hashlib.sha256(known.encode("utf-8", "surrogatepass")).hexdigest()

    def reads(self, word: str) -> bool:
        """Whether the source mentions `word`, such as the name of a message's field."""
        return word in self.source
