"""Imported once by the server from which sessions are forked. Imports alone: no array may exist before a fork."""

import mlxlora.data.load
import mlxlora.engine.engine
import mlxlora.finetune
import mlxlora.mlxlm
import mlxlora.model
import mlxlora.objectives.sft
import mlxlora.reporting.jsonl
import mlxlora.training.loop
import mlxlora.training.run

mlxlora.mlxlm.module("utils")  # with it transformers, the slowest of all
