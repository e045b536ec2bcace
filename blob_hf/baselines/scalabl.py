"""ScalaBL (Samplawski et al., UAI 2025): a Gaussian over r numbers a layer, in the subspace that LoRA spans.

    W = W_0 + scaling * B diag(s) V,    s_i ~ N(mu_i, sigma_i^2),    prior N(0, sigma_p^2),

with points B and V. Here the rows of V have norm 1 (the norm of a row of V and s are one degree of freedom), so that
the mean diag(mu) V is LoRA's A in the adapter's files, mu_i is the norm of its row i, and a sample is

    A_i + sigma_i eps_i A_i / |A_i|.

As in the authors' code A starts as diag(singular values) times its right singular vectors, every forward in training
draws one eps, and the KL has SGD steps of its own, weighted as BLoB's. Its KL is KL(p || q); here it is the ELBO's
KL(q || p).
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from blob_hf.baselines.base import METHOD_FILE, MethodState, register_method
from blob_hf.reporting.run_summary import MethodCard
from blob_hf.trainer.engines import require_whole_models
from blob_hf.trainer.kl.diagnosis import diagnose
from blob_hf.trainer.kl.schedule import KLSchedule, kl_cycle_length
from blob_hf.trainer.kl.step import lr_scale_of, stop_at
from blob_hf.tuner.adapter_files import read_beside, write_beside
from blob_hf.tuner.draws import standard_normal
from blob_hf.tuner.kl import gaussian_kl
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import lora_layers, sampled_layers
from blob_hf.tuner.sampled import SampledLinear, layer_name
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import full_tensor, gathered

if TYPE_CHECKING:
    from blob_hf.trainer.trainer import BlobTrainerMixin

logger = logging.getLogger(__name__)

INIT_STD = 0.05  # published: sigma ~ U(0.05 / sqrt(2), 0.05) at the start
STD_FILE = "scalabl.safetensors"


class SubspaceA(SampledLinear):
    """LoRA's A whose rows are scaled at random: `weight` is the mean, `log_std` (rank, 1) the log of sigma."""

    def __init__(self, linear: nn.Linear, layer: str) -> None:
        super().__init__(linear, layer)
        start = torch.empty(self.out_features, 1).uniform_(INIT_STD / 2**0.5, INIT_STD).log()
        self.log_std = nn.Parameter(start.to(linear.weight.device), requires_grad=linear.weight.requires_grad)

    def train_forward(self, x: Tensor) -> Tensor:
        sample = _sample(self.weight.float(), self.log_std.exp(), torch.randn_like(self.log_std))
        return F.linear(x, sample.to(self.weight.dtype))

    @torch.no_grad()
    def draw(self, sampling: Sampling) -> Tensor:
        noise = standard_normal(self.name, sampling, (self.out_features, 1))
        with gathered([self.weight, self.log_std]):
            mean, std = full_tensor(self.weight).float(), full_tensor(self.log_std).exp()
            return _sample(mean, std, noise.to(mean.device)).to(self.weight.dtype)

    def kl(self, prior_std: float) -> Tensor:
        """KL(q(s) || N(0, prior_std^2)) of this layer, nats."""
        return gaussian_kl(self.weight.norm(dim=1, keepdim=True), self.log_std.exp(), prior_std)

    @torch.no_grad()
    def descend_kl(self, rate: float, prior_std: float) -> None:
        """One SGD step on the KL: A goes towards 0, sigma towards the prior's; neither jumps over it."""
        gradient = (2 * self.log_std).exp() / prior_std**2 - 1
        self.weight.mul_(1 - min(1.0, rate / prior_std**2))
        self.log_std.copy_(stop_at(self.log_std, self.log_std - rate * gradient, math.log(prior_std)))


def _sample(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """A `(..., rank, in)` at some eps `(..., rank, 1)`."""
    return mean + std * noise * F.normalize(mean, dim=1)


@register_method("scalabl")
@dataclass(frozen=True)
class ScalaBLState(MethodState):
    """The prior, and the rate of the KL's own steps (defaults: the authors' code)."""

    prior_std: float = 1.0
    kl_learning_rate: float = 0.2

    files = (METHOD_FILE, STD_FILE)
    required = {"prior_std": (int, float), "kl_learning_rate": (int, float)}
    card = MethodCard(
        title="ScalaBL adapter",
        about=(
            "LoRA with a Gaussian posterior in the subspace that it spans (ScalaBL): the rows of A are scaled by one "
            "random number each. `adapter_model.safetensors` is the posterior mean, an ordinary LoRA adapter; "
            "`scalabl.safetensors` holds the log standard deviations. N=0 is the posterior mean; N=S averages the "
            "probabilities of S posterior samples."
        ),
        limits="The uncertainty is that of r numbers a layer; the directions of A, and B, are points.",
        citation="""@inproceedings{samplawski2025scalabl,
  title = {Scalable Bayesian Low-Rank Adaptation of Large Language Models via Stochastic Variational Subspace
           Inference},
  author = {Samplawski, Colin and Cobb, Adam D. and Acharya, Manoj and Kaur, Ramneet and Jha, Susmit},
  booktitle = {Conference on Uncertainty in Artificial Intelligence}, year = {2025}
}""",
        tags=("bayesian", "uncertainty", "scalabl"),
        sampled=True,
    )

    def attach(self, model: BlobModel, folder: Path) -> None:
        _attach_layers(model)
        self.refill(model, folder)

    @torch.no_grad()
    def refill(self, model: BlobModel, folder: Path) -> None:
        saved = read_beside(folder, STD_FILE)
        layers = subspace_layers(model)
        odd = sorted(saved.keys() ^ layers.keys())
        if odd:
            raise BlobError(f"{folder / STD_FILE} is of another model: {odd[0]} is not in both")
        for name, layer in layers.items():
            layer.log_std.copy_(saved[name])

    def save(self, model: BlobModel, folder: Path) -> None:
        super().save(model, folder)
        write_beside(folder, STD_FILE, {name: layer.log_std for name, layer in subspace_layers(model).items()})

    def own_optimizer(self, trainer: "BlobTrainerMixin", optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The trainer's optimizer, whose steps are followed by one on the KL; sigma does not decay.

        Raises:
            BlobError: An engine has sharded the model.
        """
        require_whole_models(trainer.accelerator, "method scalabl")
        args, model = trainer.args, trainer.blob_model
        rate = args.kl_learning_rate if isinstance(args.kl_learning_rate, float) else self.kl_learning_rate
        state = replace(self, prior_std=args.beta or self.prior_std, kl_learning_rate=rate)
        model.set_companion(state)
        batch, rows = trainer.get_total_train_batch_size(args), trainer.train_dataset
        count = len(rows) if has_length(rows) else args.max_steps * batch
        cycle = args.kl_cycle_steps or kl_cycle_length(count, args.gamma, batch)
        layers = subspace_layers(model)
        _split_stds(optimizer, layers)
        schedule = KLSchedule("geometric", cycle, count)
        trainer.remove_callback(_Forecast)
        trainer.add_callback(_Forecast(schedule, batch, None if args.kl_cycle_steps else args.gamma))

        def after_step(stepped: torch.optim.Optimizer, *_: Any) -> None:
            weight = schedule(trainer.state.global_step + 1) * lr_scale_of(stepped.param_groups[-1])
            for layer in layers.values():
                layer.descend_kl(state.kl_learning_rate * weight, state.prior_std)

        optimizer.register_step_post_hook(after_step)
        return optimizer


class _Forecast(TrainerCallback):
    """Says before a training that its KL will not be applied, as BLoB's trainer does: sigma would stay at its start."""

    def __init__(self, schedule: KLSchedule, batch_size: int, gamma: float | None) -> None:
        self.schedule, self.batch_size, self.gamma = schedule, batch_size, gamma

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        whole = replace(self.schedule, total_steps=state.max_steps)
        for warning in diagnose(whole, self.batch_size, self.gamma).warnings if state.is_world_process_zero else ():
            logger.warning("%s", warning)


def attach_scalabl(model: BlobModel, prior_std: float = 1.0) -> BlobModel:
    """Make a plain LoRA model one with ScalaBL's posterior, in place; B and A are rotated, their product stays.

    A `BlobTrainer` with `point_estimate=True` (the model has no Gaussian A) then trains it.

    Raises:
        BlobError: The adapter has a posterior already, or an A is not of full rank.
    """
    if not prior_std > 0:
        raise BlobError(f"prior_std must be > 0, got {prior_std}")
    if sampled_layers(model):
        raise BlobError("method scalabl needs a plain LoRA adapter, but this one has a posterior already")
    _rotate(model)
    _attach_layers(model)
    model.set_companion(ScalaBLState(prior_std))
    return model


def subspace_layers(model: nn.Module) -> dict[str, SubspaceA]:
    """ScalaBL's layers of the active adapter, by the name of A in its files."""
    return {layer.weight_name: layer for layer in sampled_layers(model) if isinstance(layer, SubspaceA)}


@torch.no_grad()
def _rotate(model: BlobModel) -> None:
    """Make the rows of every A orthogonal: with A = U S V^T, A becomes S V^T and B becomes B U."""
    adapter = str(model.active_adapter)
    for path, module in lora_layers(model, adapter):
        a: Any = module.lora_A[adapter].weight
        b: Any = module.lora_B[adapter].weight
        u, s, vt = torch.linalg.svd(a.float(), full_matrices=False)
        if len(s) < len(a) or not s[-1] > 1e-6 * s[0]:
            raise BlobError(
                f"method scalabl needs an A of full rank, but that of {layer_name(path)} (r={len(a)}) is not; "
                "take a smaller rank"
            )
        a.copy_(s.unsqueeze(1) * vt)
        b.copy_(b.float() @ u)


def _attach_layers(model: BlobModel) -> None:
    adapter = str(model.active_adapter)
    for path, module in lora_layers(model, adapter):
        linear: Any = module.lora_A[adapter]
        module.lora_A[adapter] = SubspaceA(linear, layer_name(path))


def _split_stds(optimizer: torch.optim.Optimizer, layers: Mapping[str, SubspaceA]) -> None:
    """Give the stds a group of their own, the last one, without weight decay: that would pull sigma towards 1."""
    stds = {layer.log_std for layer in layers.values()}
    groups = optimizer.param_groups
    found = [p for group in groups for p in group["params"] if p in stds]
    if not found:
        raise BlobError("the optimizer holds no stds of scalabl: make it after the model")
    for group in groups:
        group["params"] = [p for p in group["params"] if p not in stds]
    groups.append({**groups[0], "params": found, "weight_decay": 0.0})
