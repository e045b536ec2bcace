"""The `target` schedule: a weight pi_t that brings the KL down to a given number of nats per weight of A.

The other schedules (`kl.py`) are functions of the step; where the KL ends up is left to the learning rates. This one
looks at the posterior. It is a relative of the controllers of ControlVAE (Shao et al., 2020) and GECO (Rezende & Viola,
2018), but needs no gains to tune and keeps no state: the KL's gradient is known in closed form, and with it the weight
that lowers the KL by a wanted amount.
"""

import math

import torch
from torch import Tensor, nn

from blob_hf.tuner.kl import kl_gradient_mean, kl_gradient_rho
from blob_hf.tuner.posterior import gaussian_layers, kl_divergence
from blob_hf.utils.sharding import full_tensor, gathered

_LARGEST = 1e30  # keeps a std of exactly 0, and a mean of exactly 0, finite


class TargetSchedule:
    """pi_t such that the KL's own step brings the KL to where it should be by now; 0 when it is below.

    From the KL of the first step it should fall to the target as exp(-t / time_constant). Each step takes away all that
    the KL has above that course, including what the optimizer's last step on the NLL added (Adam takes steps of the
    learning rate's size however small the gradient: a slower correction would never get near the target).

    A function of the step, the posterior and the first KL alone: all processes get the same weight, and a resumed run
    goes on exactly.

    Args:
        model: Whose posterior is steered.
        prior_std: sigma_p.
        parameterization: `"square"` or `"softplus"`.
        nats_per_weight: The target of KL / number of weights of A.
        kl_learning_rate: Rate of the KL's own step at the peak of the learning rate; warm-up and decay slow it too.
        time_constant: Steps in which the distance to the target falls to 1/e.
        total_steps: Optimizer steps of the run.
    """

    name = "target"

    def __init__(
        self,
        model: nn.Module,
        prior_std: float,
        parameterization: str,
        nats_per_weight: float,
        kl_learning_rate: float,
        time_constant: int,
        total_steps: int,
    ) -> None:
        self.model, self.prior_std, self.parameterization = model, prior_std, parameterization
        self.nats_per_weight, self.kl_learning_rate = nats_per_weight, kl_learning_rate
        self.cycle_steps, self.total_steps = time_constant, total_steps
        self.kl_start: float | None = None  # nats, of the first step

    def __call__(self, step: int) -> float:
        if self.kl_start is None:
            self.kl_start = kl_divergence(self.model, self.prior_std).item()
        squared, available = self._slopes()
        target = self.nats_per_weight * available.numel() / 2  # a weight has a mean and a std
        course = target + max(0.0, self.kl_start - target) * math.exp(-step / self.cycle_steps)
        excess = available.sum() - course
        if excess <= 0:
            return 0.0
        return rate_for_decrease(squared, available, excess) / self.kl_learning_rate

    @torch.no_grad()
    def _slopes(self) -> tuple[Tensor, Tensor]:
        """Of every mean and every rho: the squared KL gradient, and the KL it has to lose."""
        squared, available = [], []
        for layer in gaussian_layers(self.model).values():
            with gathered([layer.weight, layer.rho]):
                mean, rho = full_tensor(layer.weight).float().flatten(), full_tensor(layer.rho).float().flatten()
                std = full_tensor(layer.std).float().flatten()
                gradients = (
                    kl_gradient_mean(mean, self.prior_std),
                    kl_gradient_rho(rho, self.prior_std, self.parameterization),
                )
                squared += [gradient.square().clamp(1 / _LARGEST, _LARGEST) for gradient in gradients]
                ratio = (std / self.prior_std).square().clamp(min=1 / _LARGEST)
                available += [mean.square() / (2 * self.prior_std**2), (ratio - ratio.log() - 1) / 2]
        return torch.cat(squared), torch.cat(available)


def rate_for_decrease(squared: Tensor, available: Tensor, decrease: Tensor) -> float:
    """The SGD rate at which a step on the KL lowers it by `decrease`: solves sum_i min(rate * g_i^2, KL_i) = decrease.

    To first order a step lowers the KL of entry i by rate * g_i^2, but never by more than the KL it has, because the
    step stops at the prior. Without that bound a few stds next to 0, whose gradient is 1/G, would seem to do all the
    work.

    Args:
        squared: g_i^2 of each entry > 0, `(entries,)`.
        available: KL_i >= 0, nats, `(entries,)`.
        decrease: In (0, sum of `available`], nats.
    """
    reached_at = available / squared  # the rate at which an entry arrives at the prior
    order = reached_at.argsort()
    reached_at, squared, available = reached_at[order], squared[order].double(), available[order].double()
    lost = available.cumsum(0) - available  # by the entries that have arrived before
    slope = squared.flip(0).cumsum(0).flip(0)  # of those that have not
    k = int(torch.searchsorted(lost + reached_at * slope, decrease.double()).clamp(max=len(order) - 1))
    return float((decrease - lost[k]) / slope[k])
