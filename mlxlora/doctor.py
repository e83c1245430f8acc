"""What this machine has for the job: versions, backend, memory, disk, and what is missing for which extra."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlxlora.files import human_bytes
from mlxlora.memory import machine_memory, recommended
from mlxlora.version import __version__

PACKAGES = ("mlx", "mlx-lm", "transformers", "tokenizers", "numpy", "huggingface-hub", "sentencepiece", "gguf")
EXTRAS = {  # module → (what it is for, how to get it)
    "pyarrow": ("Parquet files", "pip install 'mlxlora[parquet]'"),
    "datasets": ("data sets of the Hugging Face hub", "pip install 'mlxlora[datasets]'"),
    "jsonschema": ("the metric json-schema of `mlxlora compare`", "pip install 'mlxlora[compare]'"),
    "lm_eval": ("general abilities with compare --harness", "pip install 'mlxlora[harness]'"),
    "torch": ("model weights in .bin files, and reading exports back with transformers", "pip install torch"),
    "peft": ("reading PEFT exports back", "pip install peft"),
    "xllamacpp": ("reading GGUF exports back with llama.cpp", "pip install xllamacpp"),
}
SLOW = 20e9  # FLOP/s; a float32 product slower than this is a reference BLAS


@dataclass(frozen=True)
class DoctorResult:
    """What was found."""

    mlxlora: str
    python: str
    system: str
    packages: dict[str, str]
    backend: str
    device: str
    memory: int
    """bytes of the machine"""
    recommended: int
    """bytes that MLX should use at most: the wired limit's recommendation on Metal, else the machine's memory"""
    free_disk: int
    """bytes free where the cache of models lies"""
    cache: Path
    float32_rate: float
    """measured FLOP/s of a float32 matrix product"""
    missing: dict[str, str]
    """optional packages that are not installed, and what they are for"""
    advice: list[str]

    def __str__(self) -> str:
        lines = [
            f"mlxlora {self.mlxlora} on Python {self.python}, {self.system}",
            "  " + ", ".join(f"{name} {version}" for name, version in self.packages.items()),
            f"backend   {self.backend}: {self.device}",
            f"memory    {human_bytes(self.memory)}, {human_bytes(self.recommended)} recommended for MLX",
            f"disk      {human_bytes(self.free_disk)} free at {self.cache}",
            f"speed     {self.float32_rate / 1e9:,.0f} GFLOP/s in a float32 matrix product (measured just now)",
        ]
        lines += [f"optional  {name} is not installed: {why}" for name, why in self.missing.items()]
        lines += [f"advice    {text}" for text in self.advice]
        if not self.advice:
            lines.append("Everything that mlxlora needs is here.")
        return "\n".join([*lines, "", "next: mlxlora demo"])


def doctor() -> DoctorResult:
    """Look at this machine: versions, backend, memory, disk, speed, and what is missing for which extra."""
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    backend, device, memory, recommended = hardware()
    rate = matrix_product_rate()
    missing = {
        name: f"{what} ({how})" for name, (what, how) in EXTRAS.items() if importlib.util.find_spec(name) is None
    }
    return DoctorResult(
        mlxlora=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages={name: installed(name) for name in PACKAGES},
        backend=backend,
        device=device,
        memory=memory,
        recommended=recommended,
        free_disk=shutil.disk_usage(existing).free,
        cache=cache,
        float32_rate=rate,
        missing=missing,
        advice=advice(backend, rate, recommended),
    )


def installed(package: str) -> str:
    """The version of a package, or `missing`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def hardware() -> tuple[str, str, int, int]:
    """(backend, device, bytes of memory, bytes recommended)."""
    memory = machine_memory()
    if mx.metal.is_available():
        return "Metal", str(mx.device_info(mx.gpu)["device_name"]), memory, recommended()
    if mx.cuda.is_available():
        return "CUDA", str(mx.device_info(mx.gpu).get("device_name", "GPU")), memory, recommended()
    return "CPU", f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", memory, recommended()


def matrix_product_rate(size: int = 512) -> float:
    """FLOP/s of a float32 product of two square matrices: the best of a few."""
    a, b = mx.random.normal((2, size, size), key=mx.random.key(0))
    mx.eval(a @ b)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def advice(backend: str, rate: float, recommended: int) -> list[str]:
    """What would help, most important first."""
    said = []
    if backend == "CPU" and sys.platform == "darwin" and platform.machine() == "x86_64":
        said.append("this is Python for Intel; on Apple silicon install Python for arm64 to use the GPU")
    if backend == "CPU" and sys.platform == "linux" and rate < SLOW:
        said.append(
            "float32 products are slow: MLX found a reference BLAS. Install OpenBLAS (apt-get install "
            "libopenblas0-pthread), set LD_PRELOAD to its libopenblas.so.0 (`dpkg -L libopenblas0-pthread` "
            "tells where) and OPENBLAS_CORETYPE=SKYLAKEX (AVX-512) or HASWELL (AVX2) if it is older than the "
            "processor; MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=1073741824 saves another tenth. The "
            "Makefile does all of it"
        )
    if recommended < 8e9:
        said.append("under 8 GB for MLX: take models of at most 3 B parameters in 4 bits")
    return said
