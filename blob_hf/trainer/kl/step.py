"""The decoupled KL step: plain SGD on the KL, after each step of any torch optimizer on the NLL.

Like AdamW's decoupled weight decay: the KL gradient has a closed form and is elementwise in the parameter itself, so
it needs no autograd and runs on whatever tensor the engine hands the optimizer: a parameter, a ZeRO flat
partition, an FSDP shard. Decoupling matters: Adam would normalise the huge, spiky KL gradient, and clipping it
would crush the NLL's (Wang et al., NeurIPS 2024, section 4 and the authors' code).
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blob_hf.tuner.kl import kl_gradient_mean, kl_gradient_rho
from blob_hf.tuner.layer import rho_from_std
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.tuner.rows import as_row, in_rows, parts_of_row
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import local_tensor

logger = logging.getLogger(__name__)


class DecoupledKLStep:
    """Applies `p -= kl_learning_rate * (lr_t / lr_0) * weight * dKL/dp` after every `optimizer.step()`.

    Set `weight` to pi_t before each step. Construction splits the optimizer's param_groups, so do it before the
    optimizer is wrapped (accelerate, DeepSpeed), scheduled or stepped.

    Args:
        optimizer: Any torch optimizer over the model's trainable parameters.
        model: The model whose posterior is regularised.
        prior_std: sigma_p.
        parameterization: `"square"` or `"softplus"`.
        kl_learning_rate: Rate of the KL's own SGD; it follows the optimizer's schedule (warm-up and decay) in shape.
            May be set until the first step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        prior_std: float,
        parameterization: str,
        kl_learning_rate: float = 0.0,
    ) -> None:
        self.optimizer = optimizer
        self.weight = 0.0
        self.prior_std, self.parameterization, self.kl_learning_rate = prior_std, parameterization, kl_learning_rate
        split_posterior_groups(optimizer, model)
        for module in model.modules():
            if isinstance(module, BlobModel):
                module.unregularized_forwards = -1  # its KL is applied from now on
        self._unseen: dict[Tensor, str] | None = {layer.rho: name for name, layer in gaussian_layers(model).items()}
        self._handle = optimizer.register_step_post_hook(self._after_step)

    @property
    def lr_scale(self) -> float:
        """lr_t / lr_0 of the coming step: the shape of the main schedule, which the KL's rate follows."""
        return lr_scale_of(next(group for group in self.optimizer.param_groups if group.get("blob_role")))

    @property
    def learning_rate(self) -> float:
        """lr_0, the peak of the main schedule."""
        group = next(group for group in self.optimizer.param_groups if group.get("blob_role"))
        return float(group.get("initial_lr", group["lr"]))

    def remove(self) -> None:
        """Detach from the optimizer."""
        self._handle.remove()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._look_for_unreached(optimizer)
        for group in optimizer.param_groups:
            role = group.get("blob_role")
            if role is None:
                continue
            rate = self.kl_learning_rate * self.weight * lr_scale_of(group)
            if rate:
                self.apply(group["params"], role, rate)
            if role == "rho" and self.parameterization == "square":
                _keep_positive(group["params"], optimizer)

    def _look_for_unreached(self, optimizer: torch.optim.Optimizer) -> None:
        """After the first step: warn of layers whose A no forward has called, so that their noise teaches nothing."""
        if self._unseen is None:
            return
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        names = [name for rho, name in self._unseen.items() if rho in held and rho.grad is None and rho.requires_grad]
        if names:  # where an engine holds the parameters in another form, nothing is known
            logger.warning(
                "the network does not use the LoRA of %d layers (%s ...): they get the KL alone, and end at the prior",
                len(names), names[0],
            )  # fmt: skip
        self._unseen = None

    def apply(self, parameters: Sequence[Tensor], role: str, rate: float) -> None:
        """One SGD step on the KL, in place."""
        for members in in_rows(parameters):
            local = [local_tensor(member) for member in members]
            row = as_row(local)
            if role == "mean":
                stepped = descend_mean(row, rate, self.prior_std)
            else:
                stepped = descend_rho(row, rate, self.prior_std, self.parameterization)
            torch._foreach_copy_(local, parts_of_row(stepped, local))


def lr_scale_of(group: dict[str, Any]) -> float:
    """lr_t / lr_0 of an optimizer's group: the shape of its schedule."""
    return group["lr"] / (group.get("initial_lr", group["lr"]) or 1.0)


def descend_mean(mean: Tensor, rate: float, prior_std: float) -> Tensor:
    """One SGD step of a mean on the KL, which ends at 0 rather than jump over it."""
    return mean - min(rate, prior_std**2) * kl_gradient_mean(mean, prior_std)


def descend_rho(rho: Tensor, rate: float, prior_std: float, parameterization: str) -> Tensor:
    """One SGD step of a rho on the KL, which ends at the prior (std = sigma_p) rather than jump over it.

    The gradient grows like 1/G: where Adam has carried a G next to 0, a plain SGD step would throw its std far
    beyond the prior. Everywhere else stopping there changes nothing.
    """
    stepped = rho - rate * kl_gradient_rho(rho, prior_std, parameterization)
    prior = rho_from_std(torch.tensor(prior_std, dtype=torch.float64), parameterization).item()
    if parameterization == "square":  # G and -G are the same std
        sign = rho.sign()
        return sign * stop_at(rho.abs(), stepped * sign, prior)
    return stop_at(rho, stepped, prior)


def stop_at(old: Tensor, new: Tensor, limit: float) -> Tensor:
    """A step from `old` to `new` that ends at a limit rather than jump over it, elementwise."""
    return torch.where(old < limit, new.clamp(max=limit), new.clamp(min=limit))


def _keep_positive(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Turn negative G into |G|, with its momentum: the same std and the same next steps.

    Adam may carry a G through 0. A saved adapter holds stds, hence |G|, and a resumed run must fit its momentum.
    """
    for members in in_rows(parameters):
        turned = [local_tensor(member) for member in members]
        row = as_row(turned)
        signs = parts_of_row(torch.where(row < 0, -1.0, 1.0).to(row.dtype), turned)
        turned_by = list(signs)
        for member, sign in zip(members, signs, strict=True):
            states = optimizer.state.get(member, {})
            momenta = [states.get(name) for name in ("exp_avg", "momentum_buffer")]
            found = [local_tensor(momentum) for momentum in momenta if isinstance(momentum, Tensor)]
            turned += found
            turned_by += [sign] * len(found)
        torch._foreach_mul_(turned, turned_by)


def split_posterior_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give posterior means and rhos param_groups of their own, flagged by `blob_role` ("mean" or "rho").

    They take every setting of the group they came from, except weight decay: the prior is their regulariser.

    Raises:
        BlobError: The optimizer holds no posterior parameter, or already has a learning-rate scheduler.
    """
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise BlobError("the optimizer already has a scheduler: pass it alone, as optimizers=(optimizer, None)")
    roles: dict[Tensor, str] = {}
    for layer in gaussian_layers(model).values():
        roles[layer.weight], roles[layer.rho] = "mean", "rho"
    groups: list[dict[str, Any]] = []
    posterior: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for role in (None, "mean", "rho"):
            members = [parameter for parameter in group["params"] if roles.get(parameter) == role]
            if members and role is None:
                groups.append({**group, "params": members})
            elif members:
                posterior.append({**group, "params": members, "blob_role": role, "weight_decay": 0.0})
    if not any(parameter.requires_grad for parameter in roles):
        raise BlobError(
            "A is frozen, so its posterior cannot be learned: LoRA-FA's optimizer and set_requires_grad(False) do "
            "that; use another optimizer, or train plain LoRA"
        )
    if not posterior:
        raise BlobError("the optimizer holds no posterior parameters: make it after the BLoB model")
    optimizer.param_groups[:] = groups + posterior
