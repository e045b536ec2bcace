"""IVON-LoRA (Cong et al., 2024): LoRA trained by IVON (Shen et al., ICML 2024), whose preconditioner is a posterior.

Each weight of A and B has q = N(m, 1 / (lambda (h + delta))), with the prior N(0, 1 / (lambda delta)). A step takes the
gradient g_hat of the mean NLL at one draw theta = m + sigma eps and does, in the papers' equations,

    h_hat = g_hat eps / sigma                                              (reparameterisation trick)
    g     = beta1 g + (1 - beta1) g_hat
    h     = beta2 h + (1 - beta2) h_hat + (1 - beta2)^2 (h - h_hat)^2 / (2 (h + delta))     (stays > -delta)
    m     = m - alpha clip((g / (1 - beta1^t) + delta m) / (h + delta), -xi, xi)

alpha is the learning rate divided by xi: so the learning rate is the longest step of a weight, as Adam's is.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from blob_hf.baselines.base import METHOD_FILE, MethodState, register_method
from blob_hf.reporting.run_summary import MethodCard
from blob_hf.trainer.engines import require_whole_models
from blob_hf.tuner.adapter_files import read_beside, write_beside
from blob_hf.tuner.draws import sample_generator, standard_normal
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import lora_layers, sampled_layers
from blob_hf.tuner.sampled import SampledLinear, layer_name
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import full_tensor, gathered

if TYPE_CHECKING:
    from blob_hf.trainer.trainer import BlobTrainerMixin

HESSIAN_FILE = "ivon.safetensors"


@dataclass(frozen=True)
class IVONConfig:
    """Settings of IVON.

    Args:
        ess: Effective sample size lambda: the posterior is as narrow as that many examples would make it.
        hess_init: h at the start; the first std is 1 / sqrt(ess (hess_init + delta)).
        prior_std: Of the prior N(0, prior_std^2): delta = 1 / (ess prior_std^2).
        beta1, beta2: Decay of the averages of gradient and h.
        clip_radius: xi, the largest entry of the preconditioned gradient.

    Raises:
        BlobError: A field is outside its range.
    """

    ess: float = 1e6
    hess_init: float = 1e-3
    prior_std: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99999
    clip_radius: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("ess", "hess_init", "prior_std", "clip_radius"):
            if not getattr(self, name) > 0:
                raise BlobError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise BlobError(f"{name} must be >= 0 and < 1, got {getattr(self, name)}")

    @property
    def delta(self) -> float:
        """The prior's precision divided by lambda."""
        return 1 / (self.ess * self.prior_std**2)


class NewtonLinear(SampledLinear):
    """LoRA's A or B with IVON's posterior: `weight` is m, the buffer `hessian` h."""

    def __init__(self, linear: nn.Linear, layer: str, part: str, config: IVONConfig) -> None:
        super().__init__(linear, layer, part)
        self.config = config
        self.hessian: Tensor
        start = torch.full_like(linear.weight, config.hess_init, dtype=torch.float32, requires_grad=False)
        self.register_buffer("hessian", start, persistent=False)  # its file is written by `save`

    @property
    def std(self) -> Tensor:
        """Posterior stds (out, in)."""
        return (self.config.ess * (self.hessian + self.config.delta)).rsqrt()

    @torch.no_grad()
    def draw(self, sampling: Sampling) -> Tensor:
        noise = standard_normal(self.name, sampling, (self.out_features, self.in_features))
        with gathered([self.weight]):
            drawn = full_tensor(self.weight).float() + self.std * noise.to(self.weight.device)
            return drawn.to(self.weight.dtype)


class IVON(torch.optim.AdamW):
    """IVON for the weights of some layers, AdamW for all others (a head that is trained in full).

    `perturb` moves the weights to the step's draw, `step` takes them back and then on; in between they are that draw.

    Args:
        groups: Of all parameters, as torch's optimizers take them.
        layers: Whose weights are IVON's.
        seed: Names the draws: on every process the same ones, so that their mean gradient is that of one network.
        kwargs: Of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], layers: list[NewtonLinear], seed: int, **kwargs: Any) -> None:
        self.layers, self.seed = layers, seed
        self._drawn: list[tuple[Tensor, Tensor]] = []  # (m, eps) of each layer
        own = {layer.weight for layer in layers}
        others = [{**group, "params": [p for p in group["params"] if p not in own]} for group in groups]
        super().__init__([*others, {"params": [layer.weight for layer in layers]}], **kwargs)

    @torch.no_grad()
    def perturb(self) -> None:
        """Move the weights of the layers to a draw of the posterior."""
        self.restore()
        for layer in self.layers:
            steps = int(self.state[layer.weight].get("step", 0))
            noise = torch.randn(layer.weight.shape, generator=sample_generator(layer.name, self.seed, steps))
            self._drawn.append((layer.weight.clone(), noise.to(layer.weight.device)))
            layer.weight.add_(layer.std * self._drawn[-1][1])

    @torch.no_grad()
    def restore(self) -> None:
        """Move them back to their means."""
        for layer, (mean, _) in zip(self.layers, self._drawn, strict=False):
            layer.weight.copy_(mean)
        self._drawn = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not self._drawn:
            raise BlobError("IVON has no draw to take a step from: call perturb() before the forward")
        drawn, group = self._drawn, self.param_groups[-1]
        self.restore()
        for layer, (_, noise) in zip(self.layers, drawn, strict=True):
            gradient = layer.weight.grad
            if gradient is not None:
                self._step_layer(layer, gradient, noise, group)
                layer.weight.grad = None  # AdamW passes it by
        return super().step(closure)

    def _step_layer(self, layer: NewtonLinear, gradient: Tensor, noise: Tensor, group: dict[str, Any]) -> None:
        config, h = layer.config, layer.hessian
        delta, decay = config.delta, 1 - config.beta2
        estimate = gradient * noise / layer.std
        h.copy_(config.beta2 * h + decay * estimate + 0.5 * decay**2 * (h - estimate).square() / (h + delta))
        state = self.state[layer.weight]
        steps = state.setdefault("step", torch.zeros(())).add_(1)
        momentum = state.setdefault("momentum", torch.zeros_like(layer.weight)).lerp_(gradient, 1 - config.beta1)
        corrected = momentum / (1 - config.beta1 ** steps.item())
        update = (corrected + delta * layer.weight) / (h + delta)
        layer.weight.sub_(group["lr"] / config.clip_radius * update.clamp(-config.clip_radius, config.clip_radius))


class _Perturb(TrainerCallback):
    """Has the forwards and backwards of a training step see one draw of the weights."""

    def __init__(self, optimizer: IVON) -> None:
        self.optimizer = optimizer

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.optimizer.perturb()


@register_method("ivon")
@dataclass(frozen=True)
class IVONState(MethodState):
    """IVON's settings: see `IVONConfig`."""

    ess: float = IVONConfig.ess
    hess_init: float = IVONConfig.hess_init
    prior_std: float = IVONConfig.prior_std
    beta1: float = IVONConfig.beta1
    beta2: float = IVONConfig.beta2
    clip_radius: float = IVONConfig.clip_radius

    files = (METHOD_FILE, HESSIAN_FILE)
    required = {name: (int, float) for name in IVONConfig.__annotations__}
    card = MethodCard(
        title="IVON-LoRA adapter",
        about=(
            "LoRA trained by IVON, a variational optimizer: every entry of A and B has a Gaussian posterior. "
            "`adapter_model.safetensors` is the posterior mean, an ordinary LoRA adapter; `ivon.safetensors` holds the "
            "Hessian h, from which the stds are 1 / sqrt(ess (h + delta)). N=0 is the posterior mean; N=S averages the "
            "probabilities of S posterior samples."
        ),
        limits="The uncertainty covers LoRA's A and B, entry by entry; a head that is trained in full is a point.",
        citation="""@inproceedings{cong2024ivonlora,
  title = {Variational Low-Rank Adaptation Using {IVON}},
  author = {Cong, Bai and Daheim, Nico and Shen, Yuesong and Cremers, Daniel and Yokota, Rio and Khan, Mohammad Emtiyaz
            and M{\\"o}llenhoff, Thomas},
  booktitle = {NeurIPS Workshop on Fine-Tuning in Modern Machine Learning}, year = {2024}
}""",
        tags=("bayesian", "uncertainty", "ivon"),
        sampled=True,
    )

    @property
    def config(self) -> IVONConfig:
        """The settings."""
        return IVONConfig(**self.facts())

    def attach(self, model: BlobModel, folder: Path) -> None:
        _attach_layers(model, self.config)
        self.refill(model, folder)

    def refill(self, model: BlobModel, folder: Path) -> None:
        saved, layers = read_beside(folder, HESSIAN_FILE), newton_layers(model)
        odd = sorted(saved.keys() ^ {layer.weight_name for layer in layers})
        if odd:
            raise BlobError(f"{folder / HESSIAN_FILE} is of another model: {odd[0]} is not in both")
        for layer in layers:
            layer.hessian.copy_(saved[layer.weight_name])

    def save(self, model: BlobModel, folder: Path) -> None:
        super().save(model, folder)
        write_beside(folder, HESSIAN_FILE, {layer.weight_name: layer.hessian for layer in newton_layers(model)})

    def own_optimizer(self, trainer: "BlobTrainerMixin", optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """IVON in the place of the trainer's optimizer; the prior is that of `beta`, if given.

        Raises:
            BlobError: An engine has sharded the model.
        """
        require_whole_models(trainer.accelerator, "method ivon")
        args, model, layers = trainer.args, trainer.blob_model, newton_layers(trainer.blob_model)
        state = replace(self, prior_std=args.beta or self.prior_std)
        model.set_companion(state)
        for layer in layers:
            layer.config = state.config
        groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in optimizer.param_groups]
        betas = (args.adam_beta1, args.adam_beta2)
        ivon = IVON(groups, layers, args.seed, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)
        trainer.remove_callback(_Perturb)
        trainer.add_callback(_Perturb(ivon))
        return ivon


def attach_ivon(model: BlobModel, config: IVONConfig | None = None) -> BlobModel:
    """Make a plain LoRA model one with IVON's posterior, in place.

    A `BlobTrainer` with `point_estimate=True` (the model has no Gaussian A) then trains it with IVON; give it
    `max_grad_norm=0`, as IVON clips its own updates.

    Raises:
        BlobError: The adapter has a posterior already.
    """
    config = config or IVONConfig()
    if sampled_layers(model):
        raise BlobError("method ivon needs a plain LoRA adapter, but this one has a posterior already")
    _attach_layers(model, config)
    model.set_companion(IVONState(**vars(config)))
    return model


def newton_layers(model: nn.Module) -> list[NewtonLinear]:
    """IVON's layers of the active adapter."""
    return [layer for layer in sampled_layers(model) if isinstance(layer, NewtonLinear)]


def _attach_layers(model: BlobModel, config: IVONConfig) -> None:
    adapter = str(model.active_adapter)
    for path, module in lora_layers(model, adapter):
        for part in ("lora_A", "lora_B"):
            weights: Any = getattr(module, part)
            weights[adapter] = NewtonLinear(weights[adapter], layer_name(path), part, config)
