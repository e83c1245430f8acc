"""Rows, conversations, samples, batches."""

from mlxlora.data.batches import EpochPlan, Planned, collate, plan_epoch
from mlxlora.data.config import BatchConfig, SamplesConfig
from mlxlora.data.dataset import Dataset
from mlxlora.data.load import DataSplits, load
from mlxlora.data.sample import Batch, Sample

__all__ = [
    "Batch",
    "BatchConfig",
    "DataSplits",
    "Dataset",
    "EpochPlan",
    "Planned",
    "Sample",
    "SamplesConfig",
    "collate",
    "load",
    "plan_epoch",
]
