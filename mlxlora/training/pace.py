"""A Mac in use: how fast a run may go, and what keeps the machine awake.

`Host` is all that is asked of the operating system; it reads what macOS itself reports (`pmset`) and elsewhere answers
"nothing to worry about". Tests put a fake in its place.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LOOK_EVERY = 10.0  # seconds between two looks at battery and heat


class Host:
    """The operating system, as far as a run cares."""

    def on_battery(self) -> bool:
        """Whether the machine runs on its battery."""
        return "Battery Power" in self._ask("-g", "batt")

    def hot(self) -> bool:
        """Whether the system slows its processors down because of heat."""
        found = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", self._ask("-g", "therm"))
        return found is not None and int(found[1]) < 100

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Within the block the machine does not fall asleep by itself (its display may)."""
        program = shutil.which("caffeinate") if sys.platform == "darwin" else None
        if program is None:
            yield
            return
        # -w: it ends with us, however we end
        helper = subprocess.Popen([program, "-i", "-w", str(os.getpid())])
        try:
            yield
        finally:
            helper.terminate()
            helper.wait()

    def _ask(self, *words: str) -> str:
        program = shutil.which("pmset") if sys.platform == "darwin" else None
        if program is None:
            return ""
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=5, check=False)
        return done.stdout


@dataclass
class Pace:
    """Rests between steps, so that others get the machine too.

    duty:  share of the time that may be spent computing; 1 never rests
    host:  where battery and heat are read
    sleep, clock: time itself, for tests
    """

    duty: float = 0.5
    host: Host | None = None
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._looked = -LOOK_EVERY
        self.begin()

    def begin(self) -> None:
        """Work begins now: what came before is no reason to rest."""
        self._worked_since = self.clock()

    def rest(self, stopping: Callable[[], bool]) -> Iterator[str]:
        """Called between two steps: pause for the duty cycle, and as long as battery or heat ask for it.

        Yields a message when a pause for battery or heat begins and when it ends. Ends at once when `stopping()`.
        """
        worked = self.clock() - self._worked_since
        self._wait(worked * (1 / self.duty - 1), stopping)
        if self.host is not None and self.clock() - self._looked >= LOOK_EVERY:
            reason = self._reason()
            if reason:
                yield f"paused: {reason}; training goes on by itself afterwards"
                while reason and not stopping():
                    self._wait(LOOK_EVERY, stopping)
                    reason = self._reason()
                yield "training goes on"
            self._looked = self.clock()
        self._worked_since = self.clock()

    def _reason(self) -> str:
        assert self.host is not None
        if self.host.on_battery():
            return "the machine runs on battery"
        return "the machine is hot" if self.host.hot() else ""

    def _wait(self, seconds: float, stopping: Callable[[], bool]) -> None:
        end = self.clock() + seconds
        while (left := end - self.clock()) > 0 and not stopping():
            self.sleep(min(left, 0.2))
