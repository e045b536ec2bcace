"""The published experiments keep the published rate of the KL; other runs get theirs from the pull."""

import dataclasses
import logging
from collections.abc import Collection
from typing import Any

from blob_hf.data.tasks import PUBLISHED
from blob_hf.trainer.kl.rate import PUBLISHED_RATE
from blob_hf.trainer.training_args import Arguments, changed_arguments

logger = logging.getLogger(__name__)


# A run that changes one of these is not a published one.
_PUBLISHED = frozenset(
    {
        "model_name_or_path", "config_name", "dataset_name", "train_file", "demo", "max_train_samples", "max_steps",
        "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "per_device_train_batch_size",
        "gradient_accumulation_steps", "kl_schedule", "kl_cycle_steps", "kl_pull", "model_revision",
    }
)  # fmt: skip


def with_kl_rate(
    args: Arguments,
    *others: Any,
    varied: Collection[str] = (),
    tasks: Collection[str] = PUBLISHED,
    rate: float = PUBLISHED_RATE,
) -> Arguments:
    """The training arguments of a script, with the published KL rate where everything else is published, too.

    Args:
        others: Argument dataclasses beside the training arguments.
        varied: Arguments that a search varies.
        tasks: That were published, with this rate.
    """
    changed = [
        one.name
        for part in (args, *others)
        for one in dataclasses.fields(part)
        if one.name in _PUBLISHED and getattr(part, one.name) != one.default
    ]
    if args.max_steps <= 0 and "max_steps" in changed:
        logger.info("training for %g epochs; the default number of steps is switched off", args.num_train_epochs)
    if any(getattr(part, "train_head", "auto") == "true" for part in others):
        changed.append("train_head")
    if any(getattr(part, "method", "blob") != "blob" for part in others):
        changed.append("method")
    chosen = [getattr(part, "task_name", None) for part in others]
    changed += [f"task_name {task}" for task in chosen if task not in (None, *tasks)]
    changed += _PUBLISHED.union({"kl_learning_rate"}).intersection(varied)
    if args.kl_learning_rate != "auto" or changed:
        return args
    logger.info("a published experiment: its KL rate is %g", rate)
    return changed_arguments(args, kl_learning_rate=rate)
