"""What was published: the defaults of the scripts, and of their experiments the rate of the KL.

Other runs get that rate from the pull.
"""

import dataclasses
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch

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


@dataclass
class PublishedDefaults:
    """Training arguments whose published values differ from transformers' defaults (reference: [W], [K])."""

    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW (the NLL's)."})
    warmup_steps: float = field(
        default=0.06,
        metadata={"help": "Warm-up: steps, or a fraction of all if below 1.", "aliases": ["--warmup_ratio"]},
    )
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Epsilon of AdamW."})
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Keep at most so many checkpoints."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Pin memory (off without a GPU)."}
    )

    def __post_init__(self) -> None:
        """With none of --do_train, --do_eval, --do_predict given, do all three."""
        parsed: Any = self  # mixed into training arguments, whose __post_init__ comes next
        asked = parsed.do_train or parsed.do_eval or parsed.do_predict
        self.asks_to_predict: bool = parsed.do_predict  # by name: a named task's test rows have no labels
        super().__post_init__()  # type: ignore[misc]
        if not asked:
            parsed.do_train = parsed.do_eval = parsed.do_predict = True


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
