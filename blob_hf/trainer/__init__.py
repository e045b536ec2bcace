"""Floor 3, training with transformers' Trainer."""

from importlib import import_module
from typing import Any

from blob_hf.trainer.seq2seq import BlobSeq2SeqTrainer
from blob_hf.trainer.trainer import BlobTrainer
from blob_hf.trainer.training_args import BlobSeq2SeqTrainingArguments, BlobTrainingArguments

__all__ = ["BlobSeq2SeqTrainer", "BlobSeq2SeqTrainingArguments", "BlobTrainer", "BlobTrainingArguments"]

_OF_TRL = ("BlobSFTConfig", "BlobSFTTrainer")


def __getattr__(name: str) -> Any:
    """What needs TRL is imported when it is asked for: the rest works without."""
    if name in _OF_TRL:
        return getattr(import_module("blob_hf.trainer.sft"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
