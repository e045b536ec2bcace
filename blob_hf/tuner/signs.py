"""Random signs of the entries of a matrix, kept as bits: of flipout's noise, see `noise`."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def random_bits(rows: Tensor, columns: int) -> Tensor:
    """Random bits for (rows, columns) signs, packed in int32 words: 1/32 of the memory and of the random numbers."""
    words = (columns + 31) // 32
    return torch.randint(-(2**31), 2**31, (rows.shape[0], words), dtype=torch.int32, device=rows.device)


def flip(x: Tensor, bits: Tensor) -> Tensor:
    """x (rows, columns) with the sign of each entry flipped where its bit of its row is set."""
    return (flip_sign_bits if x.device.type == "cpu" else flip_by_table)(x, bits)


def flip_by_table(x: Tensor, bits: Tensor) -> Tensor:
    """`flip` by looking up the signs of each byte: few operations, the faster way on a GPU."""
    signs = F.embedding(bits.view(torch.uint8).int(), _sign_table(x.device, x.dtype))
    return x * signs.flatten(-2)[:, : x.shape[-1]]


@cache
def _sign_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The 8 signs of every byte, (256, 8)."""
    bits = torch.arange(256, device=device).unsqueeze(-1) >> torch.arange(8, device=device)
    return (1 - 2 * (bits & 1)).to(dtype)


_INT_OF_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def flip_sign_bits(x: Tensor, bits: Tensor) -> Tensor:
    """`flip` by moving the bits to the places of the sign bits: fewer memory accesses, the faster way on a CPU."""
    integer = _INT_OF_WIDTH[x.element_size()]
    width = 8 * x.element_size()
    sign_bit = torch.iinfo(integer).min
    columns = x.shape[-1]
    words = bits.view(integer) if width <= 32 else bits.to(integer)
    shifts = torch.arange(min(width, 32), dtype=integer, device=x.device)
    # move bit j of its word to the place of the sign bit; for 64-bit floats only the low 32 bits are random
    spread = (words.unsqueeze(-1) << (shifts + (width - len(shifts)))).flatten(-2)[:, :columns]
    return spread.bitwise_and_(sign_bit).bitwise_xor_(x.contiguous().view(integer)).contiguous().view(x.dtype)
