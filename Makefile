# make demo   the main job with the embedded model and data, offline
# make test   lint, types and tests
# Both set up what they need in .venv first. `make help` lists the rest.

VENV ?= .venv
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13 3.14,$(shell command -v python$(v) 2>/dev/null)) python3)
BIN := $(VENV)/bin
# setuptools warns of every editable installation
PIP := env PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet

# On Linux MLX's wheel links a reference BLAS; with OpenBLAS in front float32 products are many times faster.
OPENBLAS ?= $(firstword $(wildcard /usr/lib/*/openblas-pthread/libopenblas.so.0 /usr/lib/*/libopenblas.so.0 \
            /usr/lib64/libopenblasp.so.0 /usr/lib64/libopenblas.so.0))
# On a processor that is newer than itself OpenBLAS falls back to kernels of 2004, four times slower: it is told.
FLAGS := $(shell grep -m1 '^flags' /proc/cpuinfo 2>/dev/null)
OPENBLAS_CORETYPE ?= $(if $(filter avx512vl,$(FLAGS)),SKYLAKEX,$(if $(filter avx2,$(FLAGS)),HASWELL))
FAST := $(if $(OPENBLAS),env LD_PRELOAD=$(OPENBLAS) $(if $(OPENBLAS_CORETYPE),OPENBLAS_CORETYPE=$(OPENBLAS_CORETYPE)))
# glibc gives large arrays back to the system and takes fresh pages for the next ones: up to a tenth of a step's time.
KEEP := $(if $(filter Linux,$(shell uname)),env MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=1073741824)
# the tests run in two processes with one thread each
TESTS := env OPENBLAS_NUM_THREADS=1 $(FAST) $(BIN)/python -m pytest

.PHONY: help demo test lint parity faults architectures bench setup clean
.DEFAULT_GOAL := help

help:
	@echo "make demo           fine-tune, score, fuse and quantize the embedded model (offline, about two minutes)"
	@echo "make test           lint, types, tests"
	@echo "make parity         tests against PyTorch, transformers, PEFT and llama.cpp (installs them: 1.5 GB)"
	@echo "make faults         the long form of the fault tests: kills, full disks, hostile files, fuzzing (an hour)"
	@echo "make architectures  one LoRA step on every architecture of mlx-lm"
	@echo "make bench          speed and memory against mlx-lm and PyTorch + PEFT: a table, and benchmarks.json"
	@echo "make clean          remove .venv and everything generated"

# a stamp that is older than pyproject.toml, or an environment whose interpreter is gone, is made anew
$(BIN)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mlxlora needs Python 3.11 or newer, but $(PYTHON) is older. Say which: make PYTHON=/path/to/python3.12"; exit 2; }
	@$(BIN)/python -c '' 2>/dev/null || rm -rf $(VENV)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable '.[dev]'
	@touch $@

setup:
	@$(BIN)/python -c 'import mlxlora' 2>/dev/null || rm -f $(BIN)/.ready
	@$(MAKE) --no-print-directory $(BIN)/.ready
ifeq ($(shell uname -s),Linux)
ifeq ($(OPENBLAS),)
	@echo "note: without OpenBLAS MLX is very slow on a Linux CPU: apt-get install libopenblas0-pthread" >&2
endif
endif

demo: setup
	$(KEEP) $(FAST) $(BIN)/mlxlora demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(TESTS) -n 2 -m "not parity and not faults and not architectures"

parity: setup
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) 'torch==2.13.0'
	$(PIP) --editable '.[parity]'
	$(TESTS) -n 2 -m parity

# atheris (coverage-guided fuzzing) has wheels for Linux alone; without it those tests are skipped
faults: setup
	$(BIN)/python -c 'import atheris' 2>/dev/null || $(PIP) 'atheris>=3.0' || true
	$(TESTS) -m faults -s

architectures: setup
	$(TESTS) -m architectures -s

# BENCH='--only chat,4k --dtype bfloat16' adds options
bench: setup
	$(PIP) --editable '.[bench]'
	$(KEEP) $(FAST) $(BIN)/python -m benchmarks --json benchmarks.json $(BENCH)

clean:
	rm -rf $(VENV) build dist *.egg-info demo-run .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
