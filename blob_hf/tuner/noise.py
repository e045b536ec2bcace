"""Training-time noise: y = A x with A ~ N(M, Omega^2), decorrelated in three ways.

All three have E[y] = M x and, for one row x, Var[y_i] = sum_j Omega_ij^2 x_j^2. They differ in what rows share.
flipout and local keep nothing of the size of x for the backward pass (x itself is kept by M x anyway): signs are
kept as bits, squares are computed again. That is what keeps the memory of a step at that of plain LoRA.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def shared_noise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """One draw of A per forward, the same for every row and token."""
    return F.linear(x, (mean + std * torch.randn_like(std)).to(x.dtype))


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
