"""Training-free Bayesianization (Shi et al., NeurIPS 2025, arXiv 2412.05723): a posterior around a trained LoRA.

With the compact SVD B = U diag(d) V^T, the product is B A = (U diag(d)) (V^T A). In these coordinates

    A'_ij ~ N((V^T A)_ij, (sigma_q / d_i)^2),

so that the noise of the product is sigma_q U E with E_ij ~ N(0, 1): isotropic in the column space of B. One number is
left, sigma_q: the largest one under which the loss on some anchor examples hardly changes, found by bisection.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Subset

from blob_hf.baselines.base import MethodState, register_method
from blob_hf.reporting.run_summary import MethodCard
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import attach_posterior, gaussian_layers, lora_layers
from blob_hf.tuner.sampled import layer_name
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

SEARCH_STEPS = 10  # bisections, as the released code: sigma_q to bound / 1024

_RANK_TOLERANCE = 1e-6  # singular values below this share of the largest are directions that B does not have


@dataclass(frozen=True)
class Rotated:
    """The same product B A in the coordinates of B's singular vectors.

    Attributes:
        a: V^T A, `(rank, in)`.
        b: U diag(d), `(out, rank)`.
        unit_std: Stds of `a` for sigma_q = 1, `(rank,)`: 1 / d, and 0 in directions that B does not have.
    """

    a: Tensor
    b: Tensor
    unit_std: Tensor


@torch.no_grad()
def rotate(a: Tensor, b: Tensor) -> Rotated:
    """Rotate A `(rank, in)` and B `(out, rank)` in float32; the product stays what it is."""
    u, d, vh = torch.linalg.svd(b.float(), full_matrices=False)
    # out may be smaller than the rank (a head of two classes): the missing directions get rows and columns of zeros
    missing = a.shape[0] - len(d)
    rotated_a = torch.nn.functional.pad(vh @ a.float(), (0, 0, 0, missing))
    rotated_b = torch.nn.functional.pad(u * d, (0, missing))
    kept = d > _RANK_TOLERANCE * d.max()
    unit_std = torch.nn.functional.pad(torch.where(kept, 1 / d, 0.0), (0, missing))
    return Rotated(rotated_a, rotated_b, unit_std)


@dataclass(frozen=True)
class Search:
    """What `largest_sigma` found.

    Attributes:
        sigma: The largest sigma_q that was accepted, 0 if none was.
        change: Its change of the loss.
        tried: (sigma_q, change) of every evaluation, in order.
        at_bound: Whether even the upper bound was acceptable.
    """

    sigma: float
    change: float
    tried: tuple[tuple[float, float], ...]
    at_bound: bool


def largest_sigma(change: Callable[[float], float], tolerance: float, bound: float, steps: int) -> Search:
    """The largest sigma in [0, bound] with change(sigma) <= tolerance, by bisection to bound / 2^steps.

    Args:
        change: Change of the anchors' loss at a sigma; with the same random numbers at each, so that it is continuous.
        tolerance: >= 0.
        bound, steps: Where to look, and how often.
    """
    tried = [(bound, change(bound))]
    if tried[0][1] <= tolerance:
        return Search(bound, tried[0][1], tuple(tried), at_bound=True)
    low, low_change, high = 0.0, 0.0, bound
    for _ in range(steps):
        middle = (low + high) / 2
        tried.append((middle, change(middle)))
        if tried[-1][1] <= tolerance:
            low, low_change = tried[-1]
        else:
            high = middle
    return Search(low, low_change, tuple(tried), at_bound=False)


@dataclass(frozen=True)
class TFBConfig:
    """Settings of the search.

    Args:
        tolerance: Relative increase of the loss that is allowed, >= 0.
        bound: Largest sigma_q to try, > 0.
        num_samples: Networks that the loss is averaged over, the same at every sigma; few make sigma_q that of lucky
            draws.
        steps: Bisections.

    Raises:
        BlobError: A field is outside its range.
    """

    tolerance: float = 0.01
    bound: float = 0.5
    num_samples: int = 10
    steps: int = SEARCH_STEPS

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("tolerance", 0)):
            if getattr(self, name) < least:
                raise BlobError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if not self.bound > 0:
            raise BlobError(f"bound must be > 0, got {self.bound}")


@register_method("tfb")
@dataclass(frozen=True)
class TFBState(MethodState):
    """sigma_q, and how it was found.

    Attributes:
        relative_change: Of the loss at sigma_q.
        samples: Networks in the loss.
        anchor_nll: The loss under the trained adapter, nats.
        tried: (sigma_q, relative change) of every evaluation.
        anchors: Examples that the loss was measured on, 0 if it is not known.
    """

    sigma_q: float = 0.0
    relative_change: float = 0.0
    tolerance: float = 0.0
    bound: float = 0.0
    samples: int = 0
    anchor_nll: float = 0.0
    tried: list[list[float]] = field(default_factory=list)
    anchors: int = 0

    card = MethodCard(
        title="TFB adapter",
        about=(
            "A trained LoRA adapter made Bayesian without further training (TFB): isotropic Gaussian noise in the "
            "coordinates of B's singular vectors, as wide as a bound on the loss of some anchor examples allows. "
            "`adapter_model.safetensors` is the mean, the same network as the trained adapter; "
            "`posterior_std.safetensors` holds the stds. N=0 is the mean; N=S averages the probabilities of S samples."
        ),
        limits="The width of the posterior is one number, found on the anchors; elsewhere it can be too wide or "
        "narrow.",
        citation="""@inproceedings{shi2025tfb,
  title = {Training-Free Bayesianization for Low-Rank Adapters of Large Language Models},
  author = {Shi, Haizhou and Wang, Yibin and Han, Ligong and Zhang, Huan and Wang, Hao},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2025}
}""",
        tags=("bayesian", "uncertainty", "tfb"),
        sampled=True,
    )


def anchor_rows(rows: Any, count: int) -> Any:
    """At most `count` rows at random (always the same ones).

    Raises:
        BlobError: There are none.
    """
    if rows is None or len(rows) == 0:
        raise BlobError("method tfb needs anchor examples, but there are none; give training data")
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return rows.select(chosen) if isinstance(rows, Dataset) else Subset(rows, chosen)


def fit_tfb(
    model: BlobModel, loss: Callable[[int], float], config: TFBConfig | None = None, num_anchors: int = 0
) -> TFBState:
    """Give a trained LoRA the widest posterior that hardly changes a loss, in place.

    The criterion: with the mean NLL L_0 of the anchors under the trained adapter, and L_sigma the mean over samples of
    the NLL under a sampled network,

        (L_sigma - L_0) / L_0 <= tolerance.

    Only an increase counts: where noise makes an overconfident adapter's loss smaller, that is no harm. The paper's
    released code takes the absolute change, and divides it by the number of anchors, so that its threshold means
    something else for every size of the anchor set; here it is the relative change of the loss, whatever the size.
    The released code asks the adapter for the anchors' labels; here they are the data's own.

    Args:
        model: A `BlobModel` with a plain LoRA adapter; B and A are rotated (the product stays).
        loss: Mean NLL of the anchors under a number of sampled networks; 0: under the mean.
        config: The search.
        num_anchors: How many there are, for the record.

    Returns:
        sigma_q and how it was found; the model has it as its companion.

    Raises:
        BlobError: The adapter has a posterior already, or was not trained; the anchors' loss is 0.
    """
    if gaussian_layers(model):
        raise BlobError("method tfb needs a plain LoRA adapter, but this one has a posterior already")
    adapter = str(model.active_adapter)
    outer: list[Any] = [module.lora_B[adapter] for _, module in lora_layers(model, adapter)]
    if not any(layer.weight.any() for layer in outer):
        raise BlobError("method tfb needs a trained adapter, but B is 0 in every layer: noise in A would do nothing")
    config = config or TFBConfig()
    baseline = loss(0)
    if not baseline > 0:
        raise BlobError(
            f"method tfb bounds the relative change of the anchors' loss, but that is {baseline:g} under the adapter; "
            "give anchors that it was not trained on, or more of them"
        )
    unit = _rotate_all(model)
    layers = gaussian_layers(model)

    def set_sigma(sigma: float) -> None:
        for name, layer in layers.items():
            layer.set_std((sigma * unit[name]).unsqueeze(1).expand(-1, layer.in_features).to(layer.weight.device))

    def change(sigma: float) -> float:
        set_sigma(sigma)
        return (loss(config.num_samples) - baseline) / baseline

    found = largest_sigma(change, config.tolerance, config.bound, config.steps)
    set_sigma(found.sigma)
    if found.sigma == 0:
        logger.warning(
            "even sigma_q = %g raises the loss by more than %g: the posterior is a point",
            config.bound / 2**config.steps,
            config.tolerance,
        )
    elif found.at_bound:
        logger.warning("sigma_q is at its bound %g: the loss allows more; set a larger bound", config.bound)
    state = TFBState(
        sigma_q=found.sigma, relative_change=found.change, tolerance=config.tolerance, bound=config.bound,
        samples=config.num_samples, anchor_nll=baseline, tried=[list(pair) for pair in found.tried],
        anchors=num_anchors,
    )  # fmt: skip
    model.set_companion(state)
    return state


@torch.no_grad()
def _rotate_all(model: BlobModel) -> dict[str, Tensor]:
    """Rotate every LoRA layer of the active adapter and attach a posterior; the unit stds by layer name."""
    adapter = str(model.active_adapter)
    unit = {}
    for path, module in lora_layers(model, adapter):
        a: Any = module.lora_A[adapter].weight
        b: Any = module.lora_B[adapter].weight
        rotated = rotate(a, b)
        a.copy_(rotated.a)
        b.copy_(rotated.b)
        unit[layer_name(path)] = rotated.unit_std
    lora: Any = model.peft_config[adapter]
    config = BlobConfig.from_lora(lora)
    attach_posterior(model, config, adapter)
    model.peft_config[adapter] = config
    return unit
