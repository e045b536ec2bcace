"""The Gaussian A of one LoRA layer: its std, the training-time noise estimators, and frozen posterior samples.

`GaussianA` takes the place of the `nn.Linear` that PEFT keeps in `lora_A[adapter]`. PEFT's own forward then does
`lora_B(lora_A(dropout(x))) * scaling`, and everything about the posterior happens inside `lora_A(x)`.

Why not PEFT's `LoraVariant` hook: AQLM, AWQ, EETQ, INC and TransformerEngine layers never look at it, so a posterior
there would silently train as plain LoRA, and PEFT calls it private; a submodule needs no hook. It also gathers
under ZeRO-3 by itself, because mean and rho belong to the module whose forward reads them, is toggled, moved and
deleted by PEFT as part of `lora_A`, and leaves the posterior mean bit-identical to plain LoRA.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blob_hf.tuner.draws import Noise, standard_normal
from blob_hf.tuner.kl import gaussian_kl
from blob_hf.tuner.noise import NOISE_ESTIMATORS
from blob_hf.tuner.sampled import SampledLinear
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import full_tensor, gathered

# ----- std <-> rho -----------------------------------------------------------------------------------------------


def std_from_rho(rho: Tensor, parameterization: str) -> Tensor:
    """Omega = G * G (`square`) or log(1 + exp(rho)) (`softplus`)."""
    return rho * rho if parameterization == "square" else F.softplus(rho)


def rho_from_std(std: Tensor, parameterization: str) -> Tensor:
    """The inverse of `std_from_rho`. In double: then the root of a square is exact, and |G| survives a save."""
    wide = std.double()
    return (wide.sqrt() if parameterization == "square" else wide + torch.log(-torch.expm1(-wide))).to(std.dtype)


@torch.no_grad()
def std_to_save(rho: Tensor, parameterization: str) -> Tensor:
    """Omega in a precision from which `rho_from_std` gives back float32 rho exactly, bit for bit.

    G*G needs float32: |G| comes back, since the root halves the rounding error. softplus needs double.
    """
    return std_from_rho(rho.float() if parameterization == "square" else rho.double(), parameterization)


# ----- the layer -------------------------------------------------------------------------------------------------


class GaussianA(SampledLinear):
    """LoRA's A with a Gaussian posterior: `weight` is the mean M (rank, in_features), `rho` gives the std Omega.

    What `forward(x)` uses: frozen posterior samples if there are any (see `frozen_samples`); else the mean when in
    eval mode or `mean_only`; else noise from the estimator `noise`.
    """

    def __init__(self, linear: nn.Linear, name: str, init_eps: float, parameterization: str, noise: str) -> None:
        super().__init__(linear, name)
        self.parameterization, self.noise = parameterization, noise
        weight = linear.weight
        with gathered([weight]):
            if weight.dim() != 2 or weight.numel() == 0:
                raise BlobError(f"lora_A of {name} is empty: it is a shard, gather the model before bayesianize")
            g = torch.empty(weight.shape, dtype=torch.float32, device=weight.device).uniform_(
                init_eps / 2**0.5, init_eps
            )
        self.rho = nn.Parameter(g if parameterization == "square" else rho_from_std(g * g, parameterization))
        self.rho.requires_grad_(weight.requires_grad)

    @property
    def std(self) -> Tensor:
        """Posterior standard deviations Omega (rank, in_features), differentiable in rho."""
        return std_from_rho(self.rho, self.parameterization)

    def kl(self, prior_std: float) -> Tensor:
        """KL(q(A) || N(0, prior_std^2)) of this layer, nats."""
        return gaussian_kl(self.weight, self.std, prior_std)

    def noisy_weight(self) -> Tensor:
        """One draw of A with its gradient, (rank, in_features)."""
        return self.weight + (self.std * torch.randn_like(self.std)).to(self.weight.dtype)

    def train_forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return NOISE_ESTIMATORS[self.noise](x, self.weight, self.std)

    def wanted_noise(self, sampling: Sampling) -> Noise:
        # not (out_features, in_features): PiSSA's A has no more rows than the layer has outputs; ZeRO-3's is empty here
        return self.name, sampling, tuple(getattr(self.weight, "ds_shape", self.weight.shape))

    @torch.no_grad()
    def draw(self, sampling: Sampling) -> Tensor:
        """Posterior samples M + Omega eps of A, shape (num_samples, rank, in_features)."""
        with gathered([self.weight, self.rho]):
            mean, std = full_tensor(self.weight).float(), full_tensor(self.std).float()
            noise = standard_normal(*self.wanted_noise(sampling)).to(mean.device)
            return noise.mul_(std).add_(mean).to(self.weight.dtype)

    @torch.no_grad()
    def set_std(self, std: Tensor) -> None:
        """Set the posterior stds, (rank, in_features)."""
        with gathered([self.rho]):
            self.rho.copy_(rho_from_std(std, self.parameterization))

    def scale_noise(self, factor: float) -> None:
        """Multiply the stds: the scaled posterior is itself a Gaussian, and is saved as one."""
        self.set_std(self.std * factor)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, std={self.parameterization}, noise={self.noise}"
