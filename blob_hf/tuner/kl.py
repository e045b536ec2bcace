"""The KL term of the BLoB objective: its closed form and its gradient.

The objective at step t (Wang et al., NeurIPS 2024, eq. 6) is  NLL(batch; A ~ q) + pi_t * KL(q || p),
with q(A_ij) = N(M_ij, Omega_ij^2) and p(A_ij) = N(0, sigma_p^2).
"""

import math

import torch
from torch import Tensor


def gaussian_kl(mean: Tensor, std: Tensor, prior_std: float) -> Tensor:
    """KL(N(mean, std^2) || N(0, prior_std^2)), summed over all entries.

    Args:
        mean: Posterior means M, any shape.
        std: Posterior standard deviations Omega > 0, same shape.
        prior_std: sigma_p > 0 (the paper's beta).

    Returns:
        Scalar float32 tensor, nats: sum log(sigma_p / Omega) + (Omega^2 + M^2) / (2 sigma_p^2) - 1/2.
    """
    mean, std = mean.float(), std.float()
    return (math.log(prior_std) - std.log() + (std.square() + mean.square()) / (2 * prior_std**2) - 0.5).sum()


def kl_gradient_mean(mean: Tensor, prior_std: float) -> Tensor:
    """dKL/dM = M / sigma_p^2, elementwise."""
    return mean / prior_std**2


def kl_gradient_rho(rho: Tensor, prior_std: float, parameterization: str) -> Tensor:
    """dKL/drho = (Omega / sigma_p^2 - 1 / Omega) * dOmega/drho, elementwise.

    For `square` rho is G and this is (G^2/sigma_p^2 - 1/G^2) * 2G, with 0 where G is exactly 0: there the
    gradient does not exist, and DeepSpeed pads its flat partitions with zeros.
    """
    if parameterization == "square":
        gradient = 2 * (rho**3 / prior_std**2 - rho.reciprocal())
        return torch.where(rho == 0, torch.zeros_like(rho), gradient)
    std = torch.nn.functional.softplus(rho)
    return (std / prior_std**2 - std.reciprocal()) * torch.sigmoid(rho)
