"""MC dropout (Gal & Ghahramani, ICML 2016): the dropout on LoRA's input stays on at prediction.

A sample is one mask over the input features of each LoRA layer, held for every token and decoding step: dropping
feature j of x is dropping column j of A, so a sample is a network with the weights A diag(m) / (1 - p).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blob_hf.baselines.base import MethodState, register_method
from blob_hf.reporting.run_summary import MethodCard
from blob_hf.tuner.draws import standard_uniform
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import lora_layers
from blob_hf.tuner.sampled import SampledLinear, layer_name
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import full_tensor, gathered

DEFAULT_DROPOUT = 0.1


class MaskedA(SampledLinear):
    """LoRA's A whose samples leave out input features with probability `rate`. Training uses PEFT's own dropout."""

    def __init__(self, linear: nn.Linear, layer: str, rate: float) -> None:
        super().__init__(linear, layer)
        self.rate = rate

    def masks(self, sampling: Sampling) -> Tensor:
        """Which input features samples keep, bool `(num_samples, in_features)`; paired masks come from u and 1 - u."""
        return standard_uniform(self.name, sampling, (self.in_features,)) >= self.rate

    @torch.no_grad()
    def draw(self, sampling: Sampling) -> Tensor:
        masks = self.masks(sampling)
        with gathered([self.weight]):
            return full_tensor(self.weight) * masks.to(self.weight.device).unsqueeze(1) / (1 - self.rate)


@register_method("mc_dropout")
@dataclass(frozen=True)
class MCDropoutState(MethodState):
    """Nothing was fitted: the rate is `lora_dropout` of adapter_config.json."""

    card = MethodCard(
        title="MC-dropout LoRA adapter",
        about=(
            "LoRA trained with dropout on its input, which stays on at prediction (MC dropout): one mask per layer and "
            "sample. N=0 is the network without dropout; N=S averages the probabilities of S masks. The files are "
            "those of a plain LoRA adapter; the rate is `lora_dropout` of adapter_config.json."
        ),
        limits="The uncertainty is that of dropout on LoRA's inputs, with a rate that was chosen and not learned.",
        citation="""@inproceedings{gal2016dropout,
  title = {Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning},
  author = {Gal, Yarin and Ghahramani, Zoubin},
  booktitle = {International Conference on Machine Learning}, year = {2016}
}""",
        tags=("bayesian", "uncertainty", "mc-dropout"),
        sampled=True,
    )

    def attach(self, model: BlobModel, folder: Path) -> None:
        attach_mc_dropout(model)


def attach_mc_dropout(model: BlobModel) -> BlobModel:
    """Make a plain LoRA model with dropout one whose samples are dropout masks, in place.

    Raises:
        BlobError: The adapter has no dropout.
    """
    config: Any = model.active_peft_config
    rate = config.lora_dropout
    if not 0 < rate < 1:
        bound = "< 1" if rate > 0 else "> 0"
        raise BlobError(f"method mc_dropout needs an adapter with lora_dropout {bound}, got {rate:g}")
    adapter = str(model.active_adapter)
    for path, module in lora_layers(model, adapter):
        linear: Any = module.lora_A[adapter]
        module.lora_A[adapter] = MaskedA(linear, layer_name(path), rate)
    model.set_companion(MCDropoutState())
    return model
