"""Floor 3, training with transformers' Trainer."""

from blob_hf.trainer.seq2seq import BlobSeq2SeqTrainer
from blob_hf.trainer.trainer import BlobTrainer
from blob_hf.trainer.training_args import BlobSeq2SeqTrainingArguments, BlobTrainingArguments

__all__ = ["BlobSeq2SeqTrainer", "BlobSeq2SeqTrainingArguments", "BlobTrainer", "BlobTrainingArguments"]
