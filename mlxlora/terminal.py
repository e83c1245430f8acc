"""Text that others wrote, on a terminal: characters that would steer it are shown, not sent.

A row, a tensor's name, a template's message or a model's answer may hold sequences that retitle the window, move the
cursor over what stood there, or turn the direction of the text.
"""

from __future__ import annotations

import re

TRAINED, PARTLY, CONTROL, OFF = "\x1b[30;42m", "\x1b[30;43m", "\x1b[35m", "\x1b[0m"  # the colours that we write

_TURNING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # the direction of what follows
_STEERING = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_STEERING |= {code: f"\\u{code:04x}" for code in _TURNING}
_OURS = re.compile("(" + "|".join(map(re.escape, (TRAINED, PARTLY, CONTROL, OFF))) + ")")


def visible(text: str) -> str:
    """`text` with characters that steer a terminal spelled out; line ends and tabs stay."""
    return text.translate(_STEERING)


def visible_result(text: str) -> str:
    """The same for what a verb returns, whose own colours stay."""
    return "".join(part if index % 2 else visible(part) for index, part in enumerate(_OURS.split(text)))
