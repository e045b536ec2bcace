"""Laplace-LoRA (Yang et al., ICLR 2024): a Gaussian around a trained LoRA, from the curvature of the loss there.

laplace-torch fits a Kronecker-factored generalised Gauss-Newton matrix over the LoRA weights and the precision of
their prior. Of a weight W (out, in) it gives the posterior

    W ~ W_MAP + U_out (E / sqrt(l_out l_in^T + prior precision)) U_in^T,   E_ij ~ N(0, 1),

with eigenvectors U and eigenvalues l of the two factors; A and B and all layers are independent.
"""

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from blob_hf.baselines.base import METHOD_FILE, MethodState, register_method
from blob_hf.baselines.linearized import Factors, LaplaceLinear, Linearized, laplace_layers, linearized_prediction
from blob_hf.inference.predict import ClassPrediction, predict_classes
from blob_hf.reporting.run_summary import MethodCard
from blob_hf.tuner.adapter_files import read_beside, write_beside
from blob_hf.tuner.base_model import in_head
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import lora_layers, posterior_mean, sampled_layers
from blob_hf.tuner.sampled import layer_name
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import is_sharded

logger = logging.getLogger(__name__)

SUBSETS = ("all", "last_layer")
PRIORS = ("marglik", "validation")
PREDICTIVES = ("linearized", "sampled")
PRECISION_GRID = np.logspace(-2, 4, 13)  # for the choice by validation
FACTORS_FILE = "laplace.safetensors"
LOGIT_DRAWS = 200  # of the linearised predictive, as they cost nothing; few of a wide Gaussian have another argmax


@dataclass(frozen=True)
class LaplaceConfig:
    """Settings of the fit.

    Args:
        subset: LoRA weights with a Laplace posterior: `"all"`, or those of the `"last_layer"`.
        prior: Prior precision by the marginal likelihood (`"marglik"`), or by the predictive of held-out rows
            (`"validation"`).
        predictive: How classes are predicted: with the `"linearized"` network, or with `"sampled"` ones.

    Raises:
        BlobError: A field is none of its values.
    """

    subset: str = "all"
    prior: str = "marglik"
    predictive: str = "linearized"

    def __post_init__(self) -> None:
        for name, allowed in (("subset", SUBSETS), ("prior", PRIORS), ("predictive", PREDICTIVES)):
            if getattr(self, name) not in allowed:
                raise BlobError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


@register_method("laplace")
@dataclass(frozen=True)
class LaplaceState(MethodState):
    """The prior's precision, and how it was chosen.

    Attributes:
        rows: Training examples of the fit.
        predictive: See `LaplaceConfig`; a choice of the moment, not saved.
    """

    prior_precision: float = 1.0
    prior: str = "marglik"
    subset: str = "all"
    rows: int = 0
    predictive: str = "linearized"

    files = (METHOD_FILE, FACTORS_FILE)
    required = {"prior_precision": (int, float)}
    card = MethodCard(
        title="Laplace-LoRA adapter",
        about=(
            "A trained LoRA adapter with a Laplace approximation over its weights (Laplace-LoRA): "
            "`laplace.safetensors` holds the Kronecker factors of the curvature. `adapter_model.safetensors` is the "
            "trained adapter, unchanged. N=0 is that adapter; N=S averages the probabilities of S draws, of the "
            "linearised network (`blob_hf.baselines.linearized.linearized_prediction`) or of the sampled one "
            "(`posterior_samples`)."
        ),
        limits="A Gaussian at one mode of the loss, with A and B and all layers independent of one another.",
        citation="""@inproceedings{yang2024laplacelora,
  title = {Bayesian Low-Rank Adaptation for Large Language Models},
  author = {Yang, Adam X. and Robeyns, Maxime and Wang, Xi and Aitchison, Laurence},
  booktitle = {International Conference on Learning Representations}, year = {2024}
}""",
        tags=("bayesian", "uncertainty", "laplace"),
        sampled=True,
    )

    def facts(self) -> dict[str, Any]:
        return {name: value for name, value in super().facts().items() if name != "predictive"}

    def attach(self, model: BlobModel, folder: Path) -> None:
        tensors = read_beside(folder, FACTORS_FILE)
        names = {name.rpartition(".")[0] for name in tensors}
        factors = {n: Factors(**{key: tensors[f"{n}.{key}"] for key in Factors.__annotations__}) for n in names}
        attach_factors(model, factors, self.prior_precision)

    def save(self, model: BlobModel, folder: Path) -> None:
        super().save(model, folder)
        tensors = {
            f"{layer.weight_name}.{key}": value.detach().cpu().contiguous().clone()
            for layer in laplace_layers(model)
            for key, value in vars(layer.factors).items()
        }
        if tensors:
            write_beside(folder, FACTORS_FILE, tensors)

    def predict_classes(self, model: nn.Module, inputs: dict[str, Any], sampling: Sampling) -> ClassPrediction | None:
        """Of the linearised network, unless sampled ones were asked for."""
        if self.predictive == "sampled":
            return None
        if is_sharded(model):
            raise BlobError("the linearised predictive needs whole weights: take predictive 'sampled', or DDP")
        return linearized_prediction(model, inputs, sampling)


def fit_laplace(
    model: BlobModel,
    loader: DataLoader,
    config: LaplaceConfig | None = None,
    held_out: DataLoader | None = None,
    sampling: Sampling | None = None,
) -> LaplaceState:
    """Give a trained LoRA classifier a Laplace approximation, in place.

    Args:
        model: With a plain LoRA adapter.
        loader: Batches of the training data with "labels", each row once.
        held_out: Other batches, for the prior `"validation"`.
        sampling: Of the predictive there, default `LOGIT_DRAWS` samples.

    Returns:
        What was chosen; the model has it as its companion.

    Raises:
        BlobError: laplace-torch is not installed, there are no rows, or the adapter has a posterior already.
    """
    require_library()
    config = config or LaplaceConfig()
    rows = len(loader.dataset)  # type: ignore[arg-type]
    if rows == 0:
        raise BlobError("method laplace needs the training data, but there is none")
    if config.prior == "validation" and held_out is None:
        raise BlobError("the prior 'validation' needs held-out rows, but there are none")
    if sampled_layers(model):
        raise BlobError("method laplace needs a plain LoRA adapter, but this one has a posterior already")
    weights = lora_weights(model, config.subset)
    with posterior_mean(model):
        model.eval()
        factors, precision = fit_kron(_Logits(model), weights, loader, config.prior == "marglik")
    attach_factors(model, factors, precision)
    state = LaplaceState(precision, config.prior, config.subset, rows, config.predictive)
    model.set_companion(state)
    if held_out is not None and config.prior == "validation":
        state = replace(
            state,
            prior_precision=_choose_precision(model, held_out, config.predictive, sampling or Sampling(LOGIT_DRAWS)),
        )
        model.set_companion(state)
    logger.info(
        "Laplace: prior precision %.4g over %d weights", state.prior_precision, sum(w.numel() for w in weights.values())
    )
    return state


def library_is_there() -> bool:
    """Whether laplace-torch is installed."""
    return importlib.util.find_spec("laplace") is not None


def require_library() -> None:
    if not library_is_there():
        raise BlobError("method laplace fits with laplace-torch, which is not installed: pip install laplace-torch")


# ----- fitting ----------------------------------------------------------------------------------------------------


def lora_weights(model: BlobModel, subset: str) -> dict[str, nn.Parameter]:
    """LoRA's A and B by their names in the files; `last_layer`: those of the head, or of the last layer that has any.

    (A frozen or fully trained head has no LoRA weights, so the last layer under LoRA stands for it.)
    """
    adapter = str(model.active_adapter)
    layers = list(lora_layers(model, adapter))
    if subset == "last_layer":
        base = model.get_base_model()
        head = [(path, module) for path, module in layers if in_head(base, layer_name(path))]
        layers = (head or layers)[-1:]
    return {
        f"{path}.{part}.weight": getattr(module, part)[adapter].weight
        for path, module in layers
        for part in ("lora_A", "lora_B")
    }


class _Logits(nn.Module):
    """A classifier as laplace-torch wants it: from a batch to logits."""

    def __init__(self, model: BlobModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.model(**_inputs(self.model, batch)).logits.float()


def _inputs(model: BlobModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(model.device) for name, value in batch.items() if name != "labels"}


def fit_kron(
    network: nn.Module,
    weights: Mapping[str, nn.Parameter],
    loader: DataLoader,
    marginal_likelihood: bool = True,
    likelihood: str = "classification",
) -> tuple[dict[str, Factors], float]:
    """Fit laplace-torch's Kronecker-factored GGN over some weights of a network, and their prior's precision.

    Args:
        network: From a batch of `loader` to outputs.
        weights: By name; all others are fixed.
        loader: Batches with "labels", once through the training data.
        marginal_likelihood: Choose the precision that maximises it; else 1.

    Returns:
        Factors by name, and the prior precision.
    """
    from laplace import Laplace

    required = {parameter: parameter.requires_grad for parameter in network.parameters()}
    chosen = {id(weight) for weight in weights.values()}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        approximation: Any = Laplace(
            network, likelihood, subset_of_weights="all", hessian_structure="kron", prior_precision=1.0
        )
        approximation.fit(loader)
        if marginal_likelihood:
            approximation.optimize_prior_precision(method="marglik")
        order = [parameter for parameter in network.parameters() if parameter.requires_grad]
    finally:
        for parameter, needed in required.items():
            parameter.requires_grad_(needed)
    curvature = approximation.H
    names = {id(weight): name for name, weight in weights.items()}
    factors = {
        names[id(weight)]: Factors(*(t.detach().float().clamp(min=0) for t in values), *(u.detach() for u in vectors))
        for weight, values, vectors in zip(order, curvature.eigenvalues, curvature.eigenvectors, strict=True)
    }
    return factors, float(approximation.prior_precision.mean())


def attach_factors(model: BlobModel, factors: Mapping[str, Factors], prior_precision: float) -> None:
    """Put a `LaplaceLinear` in the place of every A and B that has factors."""
    adapter = str(model.active_adapter)
    odd = sorted(factors.keys() - lora_weights(model, "all").keys())
    if odd:
        raise BlobError(f"the Laplace posterior is of another model: it has factors of {odd[0]}, this model has not")
    for path, module in lora_layers(model, adapter):
        for part in ("lora_A", "lora_B"):
            if (found := factors.get(f"{path}.{part}.weight")) is not None:
                weights: Any = getattr(module, part)
                weights[adapter] = LaplaceLinear(weights[adapter], layer_name(path), part, found, prior_precision)


def _choose_precision(model: BlobModel, held_out: DataLoader, predictive: str, sampling: Sampling) -> float:
    """The precision of the grid under which the predictive of held-out rows has the smallest NLL; set in the model."""
    layers = laplace_layers(model)
    totals = np.zeros(len(PRECISION_GRID))
    for batch in held_out:
        labels, inputs = batch["labels"].to(model.device), _inputs(model, batch)
        # the same for all precisions
        linear = Linearized.of(model, inputs, sampling.layers) if predictive == "linearized" else None
        for index, precision in enumerate(PRECISION_GRID):
            _set_precision(layers, float(precision))
            found = predict_classes(model, inputs, sampling) if linear is None else linear.predict(sampling)
            totals[index] += F.nll_loss(found.log_probs, labels, reduction="sum").item()
    best = float(PRECISION_GRID[totals.argmin()])
    _set_precision(layers, best)
    return best


def _set_precision(layers: list[LaplaceLinear], precision: float) -> None:
    for layer in layers:
        layer.prior_precision = precision
