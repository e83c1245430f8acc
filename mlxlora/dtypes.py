"""The number formats that weights can be asked for in.

Said once: `typing` keeps one object for two unions of the same names, so a second list in another order would change
what a message shows by which module was imported first.
"""

from __future__ import annotations

from typing import Literal, get_args

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
