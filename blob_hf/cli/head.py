"""Whether a classifier's head is trained, or frozen under LoRA as published."""

import dataclasses
import logging
from typing import Any

from torch import nn

from blob_hf.cli.adapters import AdapterArguments
from blob_hf.data.tasks import PUBLISHED
from blob_hf.tuner.base_model import in_head
from blob_hf.tuner.config import default_target_modules
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

_FOUND_BY_PEFT = ("classifier", "score")  # parts of a head that PEFT trains for task_type SEQ_CLS by itself


def settle_head(adapter_args: AdapterArguments, task_name: str | None, fresh: bool = True) -> AdapterArguments:
    """The arguments with `train_head` settled where auto trains the head; says what becomes of it.

    A published task has its published form: LoRA on a frozen head. That is enough for its two classes. The random
    directions of a frozen head do not tell many classes apart, so on other data the head is trained.

    Args:
        task_name: The published task, None for own data.
        fresh: Whether a new adapter is trained: a saved one knows what its head is.
    """
    if not fresh or adapter_args.target_modules is not None:
        return adapter_args
    if adapter_args.train_head != "auto":
        logger.info(
            "the classification head is %s, as train_head says",
            "trained in full" if adapter_args.train_head == "true" else "frozen under its LoRA",
        )
        return adapter_args
    if task_name in PUBLISHED:
        logger.info("the classification head is frozen under its LoRA, as published for %s", task_name)
        return adapter_args
    logger.info("the classification head is trained in full, as these data are no published task")
    return dataclasses.replace(adapter_args, train_head="true")


def head_targets(adapter_args: AdapterArguments, base: Any) -> tuple[list[str] | str, list[str] | None]:
    """What of a classifier LoRA adapts, and what is trained in full.

    Returns:
        target_modules, and modules_to_save (None leaves that to PEFT).

    Raises:
        BlobError: train_head and target_modules contradict each other.
    """
    given, wanted = adapter_args.target_modules, adapter_args.train_head
    targets = given or default_target_modules(base.config.model_type, "classification")
    if given:
        of_head = [name for name in given if _names_head(base, name)]
        if wanted == "true" and of_head:
            raise BlobError(
                f"--train_head true trains the whole head, but --target_modules names {', '.join(of_head)} of it for "
                "LoRA; leave one of them out"
            )
        if wanted == "false" and not of_head:
            raise BlobError(
                "--train_head false freezes the head under LoRA: name its layers in --target_modules, too "
                f"({', '.join(_linear_layers(base))})"
            )
    if wanted != "true":
        return targets, None
    if isinstance(targets, list):
        targets = [name for name in targets if not _names_head(base, name)]
    parts = [name for name, module in base.named_children() if _is_head(base, name, module)]
    return targets, [name for name in parts if name not in _FOUND_BY_PEFT] or None


def _names_head(base: nn.Module, target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in _linear_layers(base))


def _linear_layers(base: nn.Module) -> list[str]:
    modules = base.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear) and in_head(base, name)]


def _is_head(base: Any, name: str, module: nn.Module) -> bool:
    return name != base.base_model_prefix and in_head(base, name) and next(module.parameters(), None) is not None
