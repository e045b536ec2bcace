"""A language model's head for a few tokens alone: the rows of its weights that these need, not the whole vocabulary.

The model's own forward runs as it is, with what it does to its logits (soft caps, scales); only the products with
the head's weights, and with LoRA's B on it, are those with the rows of the tokens. So logits and gradients are those
of the whole head at these tokens, in scoring and in training.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blob_hf.tuner.model import BlobModel

logger = logging.getLogger(__name__)
_linear: Callable[..., Tensor] = F.linear  # what nn.Linear calls; DeepSpeed's ZeRO-3 puts another in its place
_told: set[str] = set()  # reasons that the log has


@dataclass
class Cut:
    """A head in a context.

    Attributes:
        tokens: Whose logits are wanted.
        done: Whether the last forward has given theirs alone, in this order; else it has given the whole vocabulary's.
    """

    tokens: Sequence[int]
    done: bool = False
    modes: list["_RowsOfTokens"] = field(default_factory=list)


_CUT: ContextVar[Cut | None] = ContextVar("blob_hf_cut_head", default=None)


@contextmanager
def cut_head(model: BlobModel, tokens: Sequence[int]) -> Iterator[Cut]:
    """Inside the block, and in this context alone, the model's head is cut to some tokens, where it can be.

    It stays whole where it is no plain linear layer (quantised ones), where LoRA on it is not B times A (DoRA), where
    its B is sampled, where its weights are shards, and in a compiled forward.
    """
    cut = Cut(tokens)
    if torch.compiler.is_compiling():
        yield cut
        return
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    if isinstance(head, nn.Module) and not getattr(head, "can_be_cut", False):
        head.can_be_cut = True  # type: ignore[assignment]
        head.register_forward_pre_hook(_enter)
        head.register_forward_hook(_leave, always_call=True)
    before = _CUT.set(cut)
    try:
        yield cut
    finally:
        _CUT.reset(before)


def parts_of_head(head: nn.Module) -> list[nn.Linear] | str:
    """The layers of a head whose outputs are of the vocabulary; a text if it cannot be cut: why."""
    if isinstance(head, ModulesToSaveWrapper):
        parts: list[nn.Module] = [head.original_module, *head.modules_to_save.values()]
    elif type(head) is lora.Linear:
        if head.lora_variant:
            return f"LoRA on it is {type(next(iter(head.lora_variant.values()))).__name__}"
        parts = [head.get_base_layer(), *head.lora_B.values()]
    else:
        parts = [head]
    for part in parts:
        if type(part) is not nn.Linear:  # not a subclass: that may compute anything
            return f"a part of it is {type(part).__name__}, not a plain linear layer"
        if type(part.weight) not in (nn.Parameter, Tensor):
            return f"a part of it keeps its weights as {type(part.weight).__name__}"  # shards, quantised ones
    return [part for part in parts if isinstance(part, nn.Linear)]


def _enter(head: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling() or (cut := _CUT.get()) is None:
        return
    parts = parts_of_head(head)
    if isinstance(parts, str):
        if parts not in _told:
            _told.add(parts)
            logger.debug("the head is not cut to the tokens of the answers: %s", parts)
        return
    cut.modes.append(_RowsOfTokens(parts, cut))
    cut.modes[-1].__enter__()


def _leave(head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_compiling() and (cut := _CUT.get()) is not None and cut.modes:
        cut.modes.pop().__exit__(None, None, None)


class _RowsOfTokens(TorchFunctionMode):
    """In this thread, products with the weights of some layers are those with the rows of a cut's tokens."""

    def __init__(self, layers: Sequence[nn.Linear], cut: Cut) -> None:
        super().__init__()
        self._layers, self._cut = layers, cut

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # by what the weight is now: engines and offloading put it in its place for the time of a forward
        if func is _linear and len(args) >= 2 and any(args[1] is layer.weight for layer in self._layers):
            rows = torch.tensor(self._cut.tokens, device=args[1].device)
            bias = args[2] if len(args) > 2 else None
            self._cut.done = True
            return func(args[0], args[1][rows], None if bias is None else bias[rows])
        return func(*args, **(kwargs or {}))
