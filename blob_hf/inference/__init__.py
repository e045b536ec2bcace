"""Floor 2, what one does with a posterior: predict, generate, measure uncertainty, export samples."""

from blob_hf.inference.answers import Prediction, TextPrediction
from blob_hf.inference.export import export_samples
from blob_hf.inference.generate import generate_mean, generate_posterior, generate_predictive, generate_samples
from blob_hf.inference.pipeline import PredictivePipeline
from blob_hf.inference.predict import ClassPrediction, TokenScores, predict_classes, score_targets
from blob_hf.inference.predictor import DECODINGS
from blob_hf.inference.uncertainty import PredictiveText, TokenUncertainty

__all__ = [
    "DECODINGS",
    "ClassPrediction",
    "Prediction",
    "PredictivePipeline",
    "PredictiveText",
    "TextPrediction",
    "TokenScores",
    "TokenUncertainty",
    "export_samples",
    "generate_mean",
    "generate_posterior",
    "generate_predictive",
    "generate_samples",
    "predict_classes",
    "score_targets",
]
