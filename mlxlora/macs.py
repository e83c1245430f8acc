"""Macs with Apple silicon: which memory comes with which chip, and how much of it macOS lends the GPU."""

from __future__ import annotations

import re

from mlxlora.errors import ConfigError, nearest

# GB of memory that each chip was sold with (Apple's technical specifications of MacBook, iMac, Mac mini, Studio, Pro)
CHIPS: dict[str, tuple[int, ...]] = {
    "M1": (8, 16),
    "M1 Pro": (16, 32),
    "M1 Max": (32, 64),
    "M1 Ultra": (64, 128),
    "M2": (8, 16, 24),
    "M2 Pro": (16, 32),
    "M2 Max": (32, 64, 96),
    "M2 Ultra": (64, 128, 192),
    "M3": (8, 16, 24),
    "M3 Pro": (18, 36),
    "M3 Max": (36, 48, 64, 96, 128),
    "M3 Ultra": (96, 256, 512),
    "M4": (16, 24, 32),
    "M4 Pro": (24, 48, 64),
    "M4 Max": (36, 48, 64, 128),
    "M5": (16, 24, 32),
    "M5 Pro": (24, 48, 64),
    "M5 Max": (36, 48, 64, 128),
}
MEMORIES = sorted({memory for sizes in CHIPS.values() for memory in sizes})
SMALL = 36  # GB below which macOS lends the GPU two thirds, and from which on it lends three quarters


def working_set(memory: int) -> int:
    """Bytes that macOS recommends a program to use on the GPU at most, as Metal tells it.

    (`recommendedMaxWorkingSetSize`: 10.7 GiB of 16, 21.3 of 32, 27 of 36, 48 of 64, 96 of 128. macOS 26 was seen to
    lend 107.5 GiB of 128: what is said here is on the safe side of that.)
    """
    return memory * 2**30 * 2 // 3 if memory < SMALL else memory * 2**30 * 3 // 4


def mac(text: str) -> tuple[str, int]:
    """(name, GB of memory) of a Mac written like `M2 16GB` or `Apple M3 Pro, 36 GB`.

    Raises ConfigError for a chip that there is not, and for memory that it was not sold with.
    """
    found = re.fullmatch(r"\s*(?:apple\s+)?(.*?)[\s,]*\b(\d+)\s*(?:gi?b?)?\s*", text, re.IGNORECASE)
    asked = " ".join(found[1].replace("-", " ").split()) if found else ""
    if found is None or not asked:
        raise ConfigError(f'--for is \'{text}\'. Say the chip and its memory, such as "M2 16GB" or "M4 Pro 48GB".')
    chip = next((name for name in CHIPS if name.lower() == asked.lower()), None)
    if chip is None:
        raise ConfigError(
            f"--for is '{text}', and there is no chip '{asked}' in the table.{nearest(asked, list(CHIPS))} "
            f"There are: {', '.join(CHIPS)}. For any other machine say what MLX may take: --memory_limit 12GB."
        )
    memory = int(found[2])
    if memory not in CHIPS[chip]:
        sizes = ", ".join(f"{size} GB" for size in CHIPS[chip])
        raise ConfigError(f"--for is '{text}', but Macs with {chip} come with {sizes}.")
    return f"{chip} {memory}GB", memory
