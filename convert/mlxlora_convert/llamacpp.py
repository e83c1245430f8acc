"""llama.cpp as the judge of what we write for it.

It runs (through the package xllamacpp) in a process of its own: a file that makes llama.cpp abort ends that process,
and here arrives an error that quotes its last words.
"""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mlxlora.errors import MlxLoraError
from mlxlora_convert.probe import ReaderMissing

WORKER = Path(__file__).with_name("llamacpp_worker.py")
QUOTED_LINES = 6


def installed() -> bool:
    """Whether xllamacpp is there to ask."""
    return importlib.util.find_spec("xllamacpp") is not None


class ReaderError(MlxLoraError):
    """llama.cpp refused a file, failed on it, or did not answer in time."""


class LlamaCpp:
    """A GGUF model loaded by llama.cpp; use it as a context manager.

    model:   the GGUF file
    adapter: a GGUF LoRA adapter to apply, at `scale`
    context: tokens of context to allow for
    timeout: seconds to wait for loading and for each answer

    Raises ReaderMissing when xllamacpp is not installed, ReaderError when llama.cpp refuses the file.
    """

    def __init__(
        self,
        model: Path,
        *,
        adapter: Path | None = None,
        scale: float = 1.0,
        context: int = 256,
        threads: int | None = None,
        timeout: float = 600.0,
    ) -> None:
        if not installed():
            raise ReaderMissing("llama.cpp", "pip install xllamacpp")
        self.timeout = timeout
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        settings = {
            "model": str(model),
            "adapter": str(adapter) if adapter else None,
            "scale": scale,
            "context": context,
            "threads": threads or max(1, min(8, os.cpu_count() or 1)),
        }
        self._buffer = b""
        try:
            self._exchange(settings)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; with `special`, control tokens are recognised and BOS/EOS added as the file says."""
        return [int(token) for token in self._ask("tokenize", text, special)]

    def tokenize_all(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Token ids of each text; see `tokenize`."""
        return [[int(token) for token in tokens] for tokens in self._ask("tokenize_all", list(texts), special)]

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`."""
        return str(self._ask("detokenize", list(tokens)))

    def render(self, conversation: dict[str, Any]) -> str:
        """The chat template's text for {"messages": […], "tools": […], …}."""
        return str(self._ask("render", conversation))

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """`count` tokens drawn greedily after `tokens`."""
        return [int(token) for token in self._ask("generate", list(tokens), count)]

    def log_probs(self, tokens: Sequence[int], vocabulary: int, top: int | None = None) -> NDArray[np.float32]:
        """Log-probabilities [tokens, vocabulary] after each token; NaN for all but the `top` likeliest."""
        rows = self._ask("log_probs", [int(token) for token in tokens], top or vocabulary)
        result = np.full((len(rows), vocabulary), np.nan, dtype=np.float32)
        for row, pairs in zip(result, rows, strict=True):
            for token, value in pairs:
                if token < vocabulary:
                    row[int(token)] = value
        return result

    def _ask(self, name: str, *arguments: Any) -> Any:
        return self._exchange({"ask": name, "with": arguments})["result"]

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failed("ended") from None
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer

    def _line(self) -> bytes:
        """One line of the answer, within the time limit."""
        assert self._process.stdout is not None
        until = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise self._failed(f"did not answer within {self.timeout:g} s")
                chunk = os.read(self._process.stdout.fileno(), 1 << 20)
                if not chunk:
                    raise self._failed(f"ended (exit code {self._process.wait()})")
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failed(self, how: str) -> ReaderError:
        self._log.seek(0)
        lines = [line for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        errors = [line.split(" E ", 1)[1] for line in lines if " E " in line]
        said = list(dict.fromkeys(errors))[:QUOTED_LINES] or lines[-QUOTED_LINES:]
        return ReaderError("\n  ".join([f"llama.cpp {how}. It said:" if said else f"llama.cpp {how}.", *said]))
