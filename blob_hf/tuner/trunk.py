"""A shared trunk: what is the same for all samples of a batch is computed once.

Where samples differ in the last layers alone, all below them is one network, the posterior mean, and a sample-major
batch is S blocks of the same rows there. So the layers below run on the first block; at the first layer with samples
the rows are repeated. All else of the model (embeddings, masks, heads, the loop of `generate`) sees S blocks as ever.

That the blocks are the same is looked at, not believed: where they are not (samples that have begun to write texts of
their own), or rows choose their adapter, the layers below run on all rows, and the result is the same network's, at the
price of one.
"""

import inspect
import logging
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache

from blob_hf.tuner.stacks import Stack, layer_stacks

logger = logging.getLogger(__name__)

# What transformers' layers take that has a row for each row of the batch, and the least dimensions it has then.
_BY_ROW = {
    "hidden_states": 2,
    "attention_mask": 2,
    "encoder_hidden_states": 3,
    "encoder_attention_mask": 2,
    "position_bias": 4,
    "encoder_decoder_position_bias": 4,
    "position_embeddings": 3,
    "position_ids": 2,
}
_MARK = "_blob_trunk"  # of a layer that has our hooks
_MARKING = threading.Lock()  # two threads that share a trunk for the first time give a layer one pair of hooks


@dataclass(frozen=True)
class Trunk:
    """The layers of a model that all samples share.

    Attributes:
        num_samples: S.
        shared: Of each stack its layers below the first one with samples.
        first_sampled: That layer; None where nothing below it in its stack is shared, or only the head has samples.
        ends: Layers whose output leaves a stack that is shared as a whole.
        adapted: A module in the shared layers that an adapter has changed; None: there is none.
    """

    num_samples: int
    shared: tuple[Stack, ...]
    first_sampled: nn.Module | None
    ends: frozenset[nn.Module]
    adapted: nn.Module | None = None

    @property
    def rows_choose(self) -> bool:
        """Whether PEFT's `adapter_names` is at work, which names an adapter for each row to each adapted module."""
        hooks = () if self.adapted is None else self.adapted._forward_pre_hooks.values()
        return any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks)


def find_trunk(model: nn.Module, sampled: Collection[nn.Module], num_samples: int) -> Trunk:
    """The trunk below the layers that have samples.

    Args:
        sampled: Modules that are frozen at samples.

    Raises:
        BlobError: The layers of the model cannot be found.
    """
    stacks = layer_stacks(model)
    shared: list[Stack] = []
    first: nn.Module | None = None
    entry: nn.Module | None = None
    for stack in stacks:
        below: list[nn.Module] = []
        for block in stack:
            if first is None and any(module in sampled for module in block.modules()):
                first, entry = block, block if below else None
            if first is None:
                below.append(block)
        shared.append(tuple(below))
    ends = frozenset(stack[-1] for stack, below in zip(stacks, shared, strict=True) if len(below) == len(stack))
    modules = (module for below in shared for block in below for module in block.modules())
    adapted = next((one for one in modules if isinstance(one, (LoraLayer, AuxiliaryTrainingWrapper))), None)
    return Trunk(num_samples, tuple(shared), entry, ends, adapted)


@dataclass(frozen=True)
class _Role:
    """What a layer is in a trunk: one of `shared`, or the first with samples (stack None)."""

    trunk: Trunk
    stack: int | None


_ROLES: ContextVar[Mapping[int, _Role]] = ContextVar("blob_hf_trunk", default=MappingProxyType({}))  # by id of a layer
_ROWS: ContextVar[int] = ContextVar("blob_hf_trunk_rows", default=0)  # of the whole batch while it is one block; else 0


@contextmanager
def sharing(model: nn.Module, trunk: Trunk | None) -> Iterator[None]:
    """Inside the block, and in this context alone, a model shares this trunk, or none: the innermost block decides."""
    outer = _ROLES.get()
    if trunk is None and not outer:
        yield
        return
    own = {id(module) for module in model.modules()}
    roles = {key: role for key, role in outer.items() if key not in own}
    if trunk is not None and trunk.num_samples > 1:
        roles |= {id(block): _Role(trunk, index) for index, below in enumerate(trunk.shared) for block in below}
        if trunk.first_sampled is not None:
            roles[id(trunk.first_sampled)] = _Role(trunk, None)
        with _MARKING:
            for block in [*(one for below in trunk.shared for one in below), trunk.first_sampled]:
                if block is not None and not hasattr(block, _MARK):
                    setattr(block, _MARK, True)
                    block.register_forward_pre_hook(_enter, with_kwargs=True)
                    block.register_forward_hook(_leave)
    _ROLES.set(roles)
    try:
        yield
    finally:
        _ROLES.set(outer)


# ----- where layers are entered and left --------------------------------------------------------------------------


@torch.compiler.disable
def _enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Cut what a shared layer gets to one block of rows, and repeat it where samples begin."""
    role = _ROLES.get().get(id(block))
    if role is None:
        return None
    names = _argument_names(type(block))[: len(args)]  # type: ignore[arg-type]
    given = dict(zip(names, args, strict=True)) | kwargs
    samples = role.trunk.num_samples
    if role.stack is not None and block is role.trunk.shared[role.stack][0]:
        _ROWS.set(_decide(block, given, len(role.trunk.shared[role.stack]), role.trunk))
    rows = _ROWS.get()
    if not rows:
        return None
    one = rows // samples
    have, need = (rows, one) if role.stack is not None else (one, rows)
    changed = {name: _with_rows(value, name, have, need) for name, value in given.items()}
    return tuple(changed[name] for name in names), {name: changed[name] for name in kwargs}


@torch.compiler.disable
def _leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Repeat the output of a stack that is shared as a whole."""
    role, rows = _ROLES.get().get(id(block)), _ROWS.get()
    if role is None or not rows or block not in role.trunk.ends:
        return None
    hidden = output[0] if isinstance(output, tuple) else output
    hidden = hidden.repeat(role.trunk.num_samples, *[1] * (hidden.dim() - 1))
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@lru_cache
def _argument_names(kind: type[nn.Module]) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


def _with_rows(value: Any, name: str, have: int, need: int) -> Any:
    """What is by row, cut from `have` to `need` rows or repeated; everything else as it is."""
    if isinstance(value, (tuple, list)) and name in _BY_ROW:
        return type(value)(_with_rows(one, name, have, need) for one in value)
    if not (isinstance(value, Tensor) and name in _BY_ROW and value.dim() >= _BY_ROW[name] and value.shape[0] == have):
        return value
    return value[:need] if need < have else value.repeat(need // have, *[1] * (value.dim() - 1))


def _decide(block: nn.Module, given: Mapping[str, Any], depth: int, trunk: Trunk) -> int:
    """The rows of the batch, if all its blocks are the same and so may be one; 0 if not.

    Where they were one before and no longer are, what the layers have cached is repeated.
    """
    rows, samples = given["hidden_states"].shape[0], trunk.num_samples
    cache = next((one for one in given.values() if isinstance(one, Cache)), None)
    if not all(isinstance(one, DynamicCache) for one in _caches(cache)):
        return 0  # of a fixed number of rows, or with states that cannot be repeated
    cached = _cached_layers(cache, depth)
    before = {layer.keys.shape[0] for layer in cached}
    may_share = rows % samples == 0 and before <= {rows // samples} and not trunk.rows_choose
    if may_share and _same_blocks(block, given, rows, samples):
        if cache is not None:
            _follow_beams(cache, depth, samples)
        return rows
    for layer in cached:
        if layer.keys.shape[0] * samples == rows:
            _repeat_cache(layer, samples)
    return 0


def _same_blocks(block: nn.Module, given: Mapping[str, Any], rows: int, samples: int) -> bool:
    for name, value in given.items():
        values = list(value) if isinstance(value, (tuple, list)) else [value]
        for one in values:
            if not isinstance(one, Tensor):
                if name == "attention_mask" and one is not None:
                    return False  # an object of flex attention
                continue
            if name in _BY_ROW and name.startswith("position_") and one.dim() > 2 and one.shape[1] == rows:
                return False  # positions in three axes, before the rows
            # ALiBi has a row for each head of each row
            several = one.dim() > 2 and one.shape[0] and one.shape[0] % rows == 0
            if name not in _BY_ROW and (several or (one.dim() and one.shape[0] == rows)):
                logger.warning("%s takes %s, by which its layers are not shared", type(block).__name__, name)
                return False
            if one.dim() < _BY_ROW.get(name, 1) or one.shape[0] != rows:
                continue
            blocks = one.view(samples, -1, *one.shape[1:])
            if not torch.equal(blocks, blocks[:1].expand_as(blocks)):
                return False
    return True


# ----- what layers have cached ------------------------------------------------------------------------------------


def _caches(cache: Any) -> list[Any]:
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [] if cache is None else [cache]


def _cached_layers(cache: Any, depth: int) -> list[Any]:
    """Of the first layers of a stack what they have cached, if anything."""
    layers = [layer for one in _caches(cache) for layer in one.layers[:depth]]
    return [layer for layer in layers if layer.get_seq_length()]


def _repeat_cache(layer: Any, samples: int) -> None:
    for name in ("keys", "values"):
        states = getattr(layer, name)
        setattr(layer, name, states.repeat(samples, *[1] * (states.dim() - 1)))


def _follow_beams(cache: Any, depth: int, samples: int) -> None:
    """Have beam search reorder caches of one block, by the rows of all blocks."""
    if hasattr(cache, _MARK):
        return
    setattr(cache, _MARK, True)

    def reorder_blocks(beam_idx: Tensor) -> None:
        one = len(beam_idx) // samples
        short = [layer for layer in _cached_layers(cache, depth) if layer.keys.shape[0] == one]
        blocks = beam_idx.view(samples, one) - one * torch.arange(samples, device=beam_idx.device).unsqueeze(1)
        alike = torch.equal(blocks, blocks[:1].expand_as(blocks))
        for layer in short:
            if not alike:
                _repeat_cache(layer, samples)
        for layer in (layer for one in _caches(cache) for layer in one.layers):
            layer.reorder_cache(blocks[0] if alike and layer in short else beam_idx)

    cache.reorder_cache = reorder_blocks
