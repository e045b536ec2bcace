"""blob_hf: fine-tune language models with BLoB, LoRA whose A matrix is a Gaussian posterior."""

from blob_hf.inference.export import export_samples
from blob_hf.trainer.trainer import BlobSeq2SeqTrainer, BlobTrainer
from blob_hf.trainer.training_args import BlobSeq2SeqTrainingArguments, BlobTrainingArguments
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.model import BlobModel, bayesianize, get_blob_model
from blob_hf.utils.errors import BlobError
from blob_hf.version import __version__

__all__ = [
    "BlobConfig",
    "BlobError",
    "BlobModel",
    "BlobSeq2SeqTrainer",
    "BlobSeq2SeqTrainingArguments",
    "BlobTrainer",
    "BlobTrainingArguments",
    "__version__",
    "bayesianize",
    "export_samples",
    "get_blob_model",
]
