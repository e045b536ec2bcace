"""Floor 1, the method on a network: a LoRA whose A is a Gaussian posterior. Nothing here knows a trainer."""

from blob_hf.tuner.build import bayesianize, get_blob_model, get_lora_model, load_lora
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import (
    kl_divergence,
    posterior_mean,
    posterior_samples,
    posterior_statistics,
)
from blob_hf.tuner.sampled import SampledLinear
from blob_hf.tuner.sampling import Sampling

__all__ = [
    "BlobConfig",
    "BlobModel",
    "SampledLinear",
    "Sampling",
    "bayesianize",
    "get_blob_model",
    "get_lora_model",
    "kl_divergence",
    "load_lora",
    "posterior_mean",
    "posterior_samples",
    "posterior_statistics",
]
