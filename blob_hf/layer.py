"""The Gaussian A of one LoRA layer: its std, the training-time noise estimators, and frozen posterior samples.

`GaussianA` takes the place of the `nn.Linear` that PEFT keeps in `lora_A[adapter]`. PEFT's own forward then does
`lora_B(lora_A(dropout(x))) * scaling`, and everything about the posterior happens inside `lora_A(x)`.

Why not PEFT's `LoraVariant` hook: AQLM, AWQ, EETQ, INC and TransformerEngine layers never look at it, so a posterior
there would silently train as plain LoRA, and PEFT calls it private; a submodule needs no hook. It also gathers
under ZeRO-3 by itself, because mean and rho belong to the module whose forward reads them, is toggled, moved and
deleted by PEFT as part of `lora_A`, and leaves the posterior mean bit-identical to plain LoRA.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from blob_hf.errors import BlobError
from blob_hf.kl import gaussian_kl
from blob_hf.sampled import SampledLinear, standard_normal
from blob_hf.sharding import full_tensor, gathered

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


# ----- training-time noise: y = A x with A ~ N(M, Omega^2), decorrelated in three ways ----------------------------
#
# All three have E[y] = M x and, for one row x, Var[y_i] = sum_j Omega_ij^2 x_j^2. They differ in what rows share.
# flipout and local keep nothing of the size of x for the backward pass (x itself is kept by M x anyway): signs are
# kept as bits, squares are computed again. That is what keeps the memory of a step at that of plain LoRA.


def shared_noise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """One draw of A per forward, the same for every row and token."""
    return F.linear(x, mean + std * torch.randn_like(std))


def local_noise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Local reparameterization (Kingma et al., 2015): noise on the r-dimensional activation, independent per token."""
    return F.linear(x, mean) + _LocalNoise.apply(x, std.square())


def flipout_noise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Flipout (Wen et al., 2018): one draw of A, decorrelated by random signs per row *and token*, as the authors."""
    draw = (std * torch.randn_like(std)).to(x.dtype)
    return F.linear(x, mean) + _FlipoutNoise.apply(x, draw)


NOISE_ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flipout": flipout_noise,
    "local": local_noise,
    "shared": shared_noise,
}


class _LocalNoise(torch.autograd.Function):
    """zeta * sqrt(x^2 V^T) with zeta ~ N(0, 1), for variances V (r, in); in at least float32, half would overflow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, variance: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            std = x.to(variance.dtype).square() @ variance.T
        std.clamp_min_(torch.finfo(std.dtype).tiny).sqrt_()  # an all-zero row has std 0
        zeta = torch.randn_like(std)
        ctx.save_for_backward(x, variance, zeta / (2 * std))
        return zeta.mul_(std).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, variance, half_zeta_over_std = ctx.saved_tensors
        grad_var = (grad * half_zeta_over_std).flatten(0, -2)
        rows = x.flatten(0, -2).to(variance.dtype)
        grad_x = (grad_var @ variance).mul_(rows).mul_(2).view_as(x).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_variance = grad_var.T @ rows.square() if ctx.needs_input_grad[1] else None
        return grad_x, grad_variance


class _FlipoutNoise(torch.autograd.Function):
    """((x * s) D^T) * t with independent random signs s (per row and input) and t (per row and output)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        bits_in, bits_out = _random_bits(rows, rows.shape[-1]), _random_bits(rows, draw.shape[0])
        ctx.save_for_backward(x, draw, bits_in, bits_out)
        return _flip(_flip(rows, bits_in) @ draw.T, bits_out).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, draw, bits_in, bits_out = ctx.saved_tensors
        grad_rows = _flip(grad.reshape(-1, grad.shape[-1]), bits_out)
        grad_x = _flip(grad_rows @ draw, bits_in).view_as(x) if ctx.needs_input_grad[0] else None
        grad_draw = grad_rows.T @ _flip(x.reshape(-1, x.shape[-1]), bits_in) if ctx.needs_input_grad[1] else None
        return grad_x, grad_draw


_INT_OF_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _random_bits(rows: Tensor, columns: int) -> Tensor:
    """Random bits for (rows, columns) signs, packed in int32 words: 1/32 of the memory and of the random numbers."""
    words = (columns + 31) // 32
    return torch.randint(-(2**31), 2**31, (rows.shape[0], words), dtype=torch.int32, device=rows.device)


def _flip(x: Tensor, bits: Tensor) -> Tensor:
    """x (rows, columns) with the sign of entry (i, j) flipped where bit j of row i is set."""
    integer = _INT_OF_WIDTH[x.element_size()]
    width = 8 * x.element_size()
    sign_bit = torch.iinfo(integer).min
    columns = x.shape[-1]
    words = bits.view(integer) if width <= 32 else bits.to(integer)
    shifts = torch.arange(min(width, 32), dtype=integer, device=x.device)
    # move bit j of its word to the place of the sign bit; for 64-bit floats only the low 32 bits are random
    spread = (words.unsqueeze(-1) << (shifts + (width - len(shifts)))).flatten(-2)[:, :columns]
    return spread.bitwise_and_(sign_bit).bitwise_xor_(x.contiguous().view(integer)).contiguous().view(x.dtype)


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

    def train_forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight, self.std
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, mean = x.to(dtype), mean.to(dtype)
        return NOISE_ESTIMATORS[self.noise](x, mean, std)

    @torch.no_grad()
    def draw(self, num_samples: int, seed: int, first: int = 0, antithetic: bool = False) -> Tensor:
        """Posterior samples of A, shape (num_samples, rank, in_features).

        Sample s depends on (seed, s, layer name) alone: not on the number of samples, the device, the rank, the
        batch or any global random state. Antithetic samples 2k and 2k + 1 are M + Omega eps_k and M - Omega eps_k.
        """
        with gathered([self.weight, self.rho]):
            mean, std = full_tensor(self.weight).float(), full_tensor(self.std).float()
            indices = range(first, first + num_samples)
            noise = torch.stack([standard_normal(self.name, seed, i, mean.shape, antithetic) for i in indices])
            return (mean + std * noise.to(mean.device)).to(self.weight.dtype)

    @torch.no_grad()
    def set_std(self, std: Tensor) -> None:
        """Set the posterior stds, (rank, in_features)."""
        with gathered([self.rho]):
            self.rho.copy_(rho_from_std(std, self.parameterization))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, std={self.parameterization}, noise={self.noise}"
