"""The layers of a network in their order: transformers' lists of blocks, and what comes after one of them."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from blob_hf.utils.errors import BlobError

Stack = tuple[nn.Module, ...]


def layer_stacks(model: nn.Module) -> list[Stack]:
    """The layers of a model: of an encoder-decoder two stacks, the encoder's first, of others one.

    Raises:
        BlobError: They cannot be found.
    """
    found: list[tuple[str, Stack]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{own}.") for own, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and all(map(_is_layer, module)):
            found.append((path, tuple(module)))
    base: Any = next(
        (module for module in model.modules() if hasattr(getattr(module, "config", None), "model_type")), model
    )
    expected = 2 if getattr(getattr(base, "config", None), "is_encoder_decoder", False) else 1
    if len(found) != expected:
        what = "an encoder-decoder has two lists" if expected == 2 else "it has one list"
        raise BlobError(
            f"the layers of {type(base).__name__} cannot be found: {what} of transformer layers as transformers builds "
            f"them, here are {len(found)}; leave the number of layers out"
        )
    return [stack for _, stack in found]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def check_layers(model: nn.Module, layers: int) -> None:
    """Refuse a number of last layers that a model does not have.

    Raises:
        BlobError: It is not in 1 ... L, or the layers cannot be found.
    """
    total = sum(map(len, layer_stacks(model)))
    if not 1 <= layers <= total:
        raise BlobError(f"the number of last layers must be 1 to {total}, as many as the model has; got {layers}")


def in_last_layers(model: nn.Module, layers: int | None) -> Callable[[str], bool]:
    """Whether a module, by its path, is in one of the last layers of a model or comes after them (its head).

    Args:
        layers: k of them, an encoder-decoder's counted from the end of its decoder; None: every module is.

    Raises:
        BlobError: As `check_layers`.
    """
    if layers is None:
        return lambda path: True
    check_layers(model, layers)
    blocks = [block for stack in layer_stacks(model) for block in stack]
    last = set(blocks[-layers:])
    paths = [path for path, _ in model.named_modules()]
    first = next(index for index, (_, module) in enumerate(model.named_modules()) if module in last)
    after = set(paths[first:])
    below = tuple(f"{path}." for path, module in model.named_modules() if module in set(blocks) - last)
    return lambda path: path in after and not path.startswith(below)
