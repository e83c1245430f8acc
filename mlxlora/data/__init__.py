"""Rows, conversations, samples, batches."""

from mlxlora.data.batches import EpochPlan, Planned, collate, plan_epoch
from mlxlora.data.config import BatchConfig, SamplesConfig
from mlxlora.data.dataset import Dataset
from mlxlora.data.load import DataSplits, from_rows, load
from mlxlora.data.records import Completion, Conversation, Document, Message, TextRun
from mlxlora.data.sample import Batch, Sample

__all__ = [
    "Batch",
    "BatchConfig",
    "Completion",
    "Conversation",
    "DataSplits",
    "Dataset",
    "Document",
    "EpochPlan",
    "Message",
    "Planned",
    "Sample",
    "SamplesConfig",
    "TextRun",
    "collate",
    "from_rows",
    "load",
    "plan_epoch",
]
