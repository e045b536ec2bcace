"""The posterior predictive at the price of one forward: a plain LoRA adapter that was taught by a Bayesian one."""

from blob_hf.distillation.cache import TargetCache
from blob_hf.distillation.class_rows import ClassRows
from blob_hf.distillation.kept import Comparison
from blob_hf.distillation.loss import kl_classes, kl_tokens, lumped
from blob_hf.distillation.state import DistilledState, require_samples
from blob_hf.distillation.student import make_student
from blob_hf.distillation.text_rows import Context, Layout, TextRows, predictive_along, score_texts
from blob_hf.distillation.trainer import DistilTrainer

__all__ = [
    "ClassRows",
    "Comparison",
    "Context",
    "DistilTrainer",
    "DistilledState",
    "Layout",
    "TargetCache",
    "TextRows",
    "kl_classes",
    "kl_tokens",
    "lumped",
    "make_student",
    "predictive_along",
    "require_samples",
    "score_texts",
]
