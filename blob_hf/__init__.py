"""blob_hf: fine-tune language models with BLoB, LoRA whose A matrix is a Gaussian posterior."""

from typing import Any

from blob_hf import trainer as _trainer
from blob_hf.baselines import (
    IVONConfig,
    LaplaceConfig,
    TFBConfig,
    attach_ivon,
    attach_mc_dropout,
    attach_scalabl,
    fit_laplace,
    fit_tfb,
    join_members,
    prior_weight_decay,
    train_members,
)
from blob_hf.distillation import DistilTrainer, make_student
from blob_hf.inference import (
    ClassPrediction,
    Prediction,
    PredictivePipeline,
    PredictiveText,
    TextPrediction,
    export_samples,
    generate_mean,
    generate_predictive,
    generate_samples,
    predict_classes,
    score_targets,
)
from blob_hf.trainer import (
    BlobSeq2SeqTrainer,
    BlobSeq2SeqTrainingArguments,
    BlobTrainer,
    BlobTrainingArguments,
)
from blob_hf.tuner import BlobConfig, BlobModel, Sampling, bayesianize, get_blob_model, get_lora_model, load_lora
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
    "ClassPrediction",
    "DistilTrainer",
    "IVONConfig",
    "LaplaceConfig",
    "Prediction",
    "PredictivePipeline",
    "PredictiveText",
    "Sampling",
    "TFBConfig",
    "TextPrediction",
    "__version__",
    "attach_ivon",
    "attach_mc_dropout",
    "attach_scalabl",
    "bayesianize",
    "export_samples",
    "fit_laplace",
    "fit_tfb",
    "generate_mean",
    "generate_predictive",
    "generate_samples",
    "get_blob_model",
    "get_lora_model",
    "join_members",
    "load_lora",
    "make_student",
    "predict_classes",
    "prior_weight_decay",
    "score_targets",
    "train_members",
]


def __getattr__(name: str) -> Any:
    """`BlobSFTTrainer` and `BlobSFTConfig`, which need TRL."""
    if name in _trainer._OF_TRL:
        return getattr(_trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
