"""A model in eval mode for as long as somebody predicts with it, also where several threads do."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass
class _Evaluation:
    """The threads that evaluate a model at the moment, and the modes that its modules were in before the first."""

    threads: int
    modes: list[tuple[nn.Module, bool]]


_EVALUATIONS: dict[int, _Evaluation] = {}  # by id of the model
_LOCK = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; when the last thread has left it, every module is in the mode it was in."""
    with _LOCK:
        if id(model) not in _EVALUATIONS:
            _EVALUATIONS[id(model)] = _Evaluation(0, [(module, module.training) for module in model.modules()])
        _EVALUATIONS[id(model)].threads += 1
        model.eval()
    try:
        yield
    finally:
        with _LOCK:
            now = _EVALUATIONS[id(model)]
            now.threads -= 1
            if not now.threads:
                del _EVALUATIONS[id(model)]
                for module, training in now.modes:
                    module.training = training
