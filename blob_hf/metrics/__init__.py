"""Metrics over numpy arrays; each module also holds an `evaluate.Metric` that loads without network."""

from blob_hf.metrics.calibration import (
    Calibration,
    accuracy,
    brier,
    calibration_metrics,
    confidence,
    ece,
    nll,
    reliability_bins,
)
from blob_hf.metrics.classification import classification_metrics, rejection_curves
from blob_hf.metrics.summaries import selective_summarization, summaries_report
from blob_hf.metrics.summarization import MultiReferenceRouge, rouge, rouge_per_example
from blob_hf.metrics.uncertainty import (
    Uncertainty,
    expected_entropy,
    mutual_information,
    predictive_entropy,
    predictive_log_probs,
    uncertainty_metrics,
)

__all__ = [
    "Calibration",
    "MultiReferenceRouge",
    "Uncertainty",
    "accuracy",
    "brier",
    "calibration_metrics",
    "classification_metrics",
    "confidence",
    "ece",
    "expected_entropy",
    "mutual_information",
    "nll",
    "predictive_entropy",
    "predictive_log_probs",
    "rejection_curves",
    "reliability_bins",
    "rouge",
    "rouge_per_example",
    "selective_summarization",
    "summaries_report",
    "uncertainty_metrics",
]
