"""What numbers a run can work with: checked before anything is loaded, by the flags' names."""

import math
from typing import Any

from blob_hf.utils.errors import BlobError

# Counts. Those that transformers gives a meaning below 1 have it beside them.
_AT_LEAST_1 = {
    "per_device_train_batch_size": None,
    "per_device_eval_batch_size": None,
    "gradient_accumulation_steps": None,
    "max_steps": -1,  # num_train_epochs decides
    "save_total_limit": None,
    "max_length": None,
    "max_source_length": None,
    "max_target_length": None,
    "max_new_tokens": None,
    "num_beams": None,
    "lora_r": None,
    "lora_alpha": None,
    "max_train_samples": None,
    "max_eval_samples": None,
    "max_predict_samples": None,
    "batch_size": None,
    "posterior_batch_size": None,
}
_ABOVE_0 = (
    "learning_rate",
    "num_train_epochs",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "init_eps",
    "adam_epsilon",
)
_AT_LEAST_0 = ("warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers", "label_smoothing_factor")
_BELOW_1 = ("lora_dropout", "label_smoothing_factor", "adam_beta1", "adam_beta2")


def check_numbers(*parts: Any) -> None:
    """Refuse numbers that no run can work with.

    Args:
        parts: Parsed arguments.

    Raises:
        BlobError: naming the first one.
    """
    for part in parts:
        values = {name: value for name, value in vars(part).items() if isinstance(value, (int, float))}
        for name, value in values.items():
            if isinstance(value, float) and math.isnan(value):
                raise BlobError(f"{name} must be a number, got nan")
            if name in _AT_LEAST_1 and value < 1 and value != _AT_LEAST_1[name]:
                other = "" if _AT_LEAST_1[name] is None else f" or {_AT_LEAST_1[name]}"
                raise BlobError(f"{name} must be >= 1{other}, got {value:g}")
            if name in _ABOVE_0 and not value > 0:
                raise BlobError(f"{name} must be > 0, got {value:g}")
            if name in _AT_LEAST_0 and value < 0:
                raise BlobError(f"{name} must be >= 0, got {value:g}")
            if name in _BELOW_1 and not 0 <= value < 1:
                raise BlobError(f"{name} must be >= 0 and < 1, got {value:g}")
