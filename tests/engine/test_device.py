"""The thread beside the one that takes gradients."""

from __future__ import annotations

import time
import weakref
from queue import SimpleQueue
from typing import Any

import pytest

from mlxlora.engine import device
from mlxlora.engine.device import aside, settling_afterwards


def test_failures_come_back_from_the_other_thread() -> None:
    def fails() -> None:
        raise ValueError("no")

    with settling_afterwards(), pytest.raises(ValueError, match="no"):
        aside(fails)


def test_the_other_thread_holds_nothing_when_it_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or how much memory a step takes would hang on which thread is quicker."""

    class Slow(SimpleQueue[Any]):
        def put(self, item: Any, *rest: Any) -> None:
            super().put(item, *rest)
            time.sleep(0.05)

    class Array:
        """Something to hold."""

    monkeypatch.setattr(device, "SimpleQueue", Slow)
    other, given = device._Beside(), Array()
    found = other.run(lambda _: Array(), given)
    alive = [weakref.ref(given), weakref.ref(found)]
    del given, found
    assert [one() for one in alive] == [None, None]
