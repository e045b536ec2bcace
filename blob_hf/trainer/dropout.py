"""Switch off the backbone's own dropout for training, as the authors do (they never leave eval mode)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def no_base_dropout(model: nn.Module) -> Iterator[None]:
    """Inside the block every dropout rate of the backbone is 0; LoRA's own `lora_dropout` stays.

    Rates are zeroed rather than modules put in eval mode, which would also switch off gradient checkpointing.
    transformers keeps rates in `nn.Dropout` modules and, for functional dropout and layer drop, in float attributes
    of the layers (`dropout`, `attention_dropout`, `layerdrop`, ...).
    """
    saved: list[tuple[nn.Module, str, float]] = []
    for path, module in model.named_modules():
        if ".lora_dropout" in path:
            continue
        for name, value in list(vars(module).items()):
            is_rate = "drop" in name or (name == "p" and "Dropout" in type(module).__name__)
            if is_rate and isinstance(value, float) and value > 0:
                saved.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
