"""Many tensors as one row: what is done elementwise to the parameters of all layers is done to a row of them.

On a GPU starting an operation on every layer takes longer than the arithmetic; all layers at once would need as many
temporary numbers as the posterior has. So a row has about a million.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

ROW = 2**20  # numbers in a row, if no single tensor has more: 4 MiB


def in_rows(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors, on their devices and of their dtypes, in groups of at most `ROW` numbers (or of a single tensor)."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    counts: dict[tuple[torch.device, torch.dtype], int] = {}
    for tensor in tensors:
        kind = (tensor.device, tensor.dtype)
        group, count = groups.setdefault(kind, []), counts.get(kind, 0) + tensor.numel()
        if group and count > ROW:
            yield list(group)
            group.clear()
            count = tensor.numel()
        group.append(tensor)
        counts[kind] = count
    yield from groups.values()


def as_row(members: Sequence[Tensor]) -> Tensor:
    """The numbers of some tensors, one after another."""
    return torch.cat([member.flatten() for member in members])


def parts_of_row(row: Tensor, members: Sequence[Tensor]) -> list[Tensor]:
    """A row in the shapes of the tensors that it was made of."""
    parts = row.split([member.numel() for member in members])
    return [part.view(member.shape) for part, member in zip(parts, members, strict=True)]
