"""Training-time noise: y = A x with A ~ N(M, Omega^2), decorrelated in three ways.

All three have E[y] = M x and, for one row x, Var[y_i] = sum_j Omega_ij^2 x_j^2. They differ in what rows share.
Each is one node of the graph with its own backward pass: on a GPU a small step is as long as it has operations. None
keeps anything of the size of x but x itself for the backward pass: signs are kept as bits, squares are computed again.
That is what keeps the memory of a step at that of plain LoRA.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from blob_hf.tuner.signs import flip, random_bits

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def shared_noise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """One draw of A per forward, the same for every row and token."""
    return _SharedNoise.apply(x, mean, std)


def local_noise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Local reparameterization (Kingma et al., 2015): noise on the r-dimensional activation, independent per token."""
    return _LocalNoise.apply(x, mean, std)


def flipout_noise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Flipout (Wen et al., 2018): one draw of A, decorrelated by random signs per row *and token*, as the authors."""
    return _FlipoutNoise.apply(x, mean, std)


NOISE_ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flipout": flipout_noise,
    "local": local_noise,
    "shared": shared_noise,
}


def _as_in_forward(backward: Callable[[Any, Tensor], Gradients]) -> Callable[[Any, Tensor], Gradients]:
    """A backward pass in the dtypes of its forward, also where it is called inside autocast."""

    @wraps(backward)
    def exact(ctx: Any, grad: Tensor) -> Gradients:
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return exact


class _SharedNoise(torch.autograd.Function):
    """x (M + Omega eps)^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        noise = torch.randn_like(std)
        drawn = (mean + std * noise).to(x.dtype)
        ctx.save_for_backward(x, drawn, noise)
        ctx.mean_dtype = mean.dtype
        return F.linear(x, drawn)

    @staticmethod
    @once_differentiable
    @_as_in_forward
    def backward(ctx: Any, grad: Tensor) -> Gradients:  # type: ignore[override]
        x, drawn, noise = ctx.saved_tensors
        grad_drawn = _rows(grad).T @ _rows(x)
        return grad @ drawn if ctx.needs_input_grad[0] else None, grad_drawn.to(ctx.mean_dtype), grad_drawn * noise


class _LocalNoise(torch.autograd.Function):
    """x M^T + zeta * sqrt(x^2 V^T), zeta ~ N(0, 1), V = Omega^2; V in at least float32, half would overflow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        output = F.linear(x, mean.to(x.dtype))
        with torch.autocast(x.device.type, enabled=False):
            spread = x.to(std.dtype).square() @ std.square().T
        spread.clamp_min_(torch.finfo(spread.dtype).tiny).sqrt_()  # an all-zero row has std 0
        zeta = torch.randn_like(spread)
        ctx.save_for_backward(x, mean, std, zeta / (2 * spread))
        return output.add_(zeta.mul_(spread).to(x.dtype))

    @staticmethod
    @once_differentiable
    @_as_in_forward
    def backward(ctx: Any, grad: Tensor) -> Gradients:  # type: ignore[override]
        x, mean, std, half_zeta_over_spread = ctx.saved_tensors
        grad_rows, grad_variance_rows = _rows(grad), _rows(grad * half_zeta_over_spread)
        rows, wide_rows = _rows(x), _rows(x).to(std.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            through_noise = (grad_variance_rows @ std.square()).mul_(wide_rows).mul_(2).to(x.dtype)
            grad_x = torch.addmm(through_noise, grad_rows, mean.to(x.dtype)).view_as(x)
        grad_variance = grad_variance_rows.T @ wide_rows.square()
        return grad_x, (grad_rows.T @ rows).to(mean.dtype), grad_variance.mul_(std).mul_(2)


class _FlipoutNoise(torch.autograd.Function):
    """x M^T + ((x * s) (Omega eps)^T) * t with independent random signs s (per row, input) and t (per row, output)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        noise, rows = torch.randn_like(std), _rows(x)
        drawn = (std * noise).to(x.dtype)
        bits_in, bits_out = random_bits(rows, rows.shape[-1]), random_bits(rows, drawn.shape[0])
        ctx.save_for_backward(x, mean, drawn, noise, bits_in, bits_out)
        flipped = flip(flip(rows, bits_in) @ drawn.T, bits_out)
        return F.linear(rows, mean.to(x.dtype)).add_(flipped).view(*x.shape[:-1], drawn.shape[0])

    @staticmethod
    @once_differentiable
    @_as_in_forward
    def backward(ctx: Any, grad: Tensor) -> Gradients:  # type: ignore[override]
        x, mean, drawn, noise, bits_in, bits_out = ctx.saved_tensors
        rows, grad_rows = _rows(x), _rows(grad)
        grad_flipped = flip(grad_rows, bits_out)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ mean.to(x.dtype)).add_(flip(grad_flipped @ drawn, bits_in)).view_as(x)
        grad_drawn = grad_flipped.T @ flip(rows, bits_in)
        return grad_x, (grad_rows.T @ rows).to(mean.dtype), grad_drawn * noise


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
