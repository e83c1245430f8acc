"""Shared by all tests: no network, no writing outside the test's own folder."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "MLXLORA_CACHE" not in os.environ:
    os.environ["MLXLORA_CACHE"] = tempfile.mkdtemp(prefix="mlxlora-cache-")
    atexit.register(shutil.rmtree, os.environ["MLXLORA_CACHE"], ignore_errors=True)
