"""BLoB against plain LoRA, trained with all else equal: what the posterior pays on a user's own data."""

import logging
import os
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from blob_hf.cli.route import Route
from blob_hf.metrics.calibration import calibration_metrics
from blob_hf.metrics.selective import risk_coverage
from blob_hf.metrics.uncertainty import predictive_entropy
from blob_hf.trainer.trainer import BlobTrainer
from blob_hf.trainer.training_args import Arguments, changed_arguments

logger = logging.getLogger(__name__)

FOLDER = "_lora"  # in the run's; pushes leave out names with _
ANSWERED = 0.8  # share of the inputs that are answered when a classifier may abstain
SHOWN = 5

Floats = NDArray[np.floating]


def is_comparable(route: Route, trainer: BlobTrainer) -> bool:
    """Whether plain LoRA can be trained beside a run; says so if it cannot."""
    if route.name != "blob" or not trainer.args.do_train:
        return False
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        logger.warning("compare_lora is left out: a second model beside the sharded one needs a run of its own")
        return False
    return True


def rival_arguments(args: Arguments) -> Arguments:
    """The training arguments of plain LoRA beside a run: the same, in a folder of its own that nobody sees."""
    changes: dict[str, object] = {"output_dir": os.path.join(str(args.output_dir), FOLDER)}
    if not args.load_best_model_at_end:  # whose best checkpoint has to be saved
        changes["save_strategy"] = "no"
    return changed_arguments(args, push_to_hub=False, resume_from_checkpoint=None, **changes)


def comparison_table(ours: Floats, rival: Floats, labels: NDArray[np.integer], title: str) -> pd.DataFrame:
    """Metrics of two classifiers side by side.

    Args:
        ours, rival: Log-probabilities `(examples, classes)`, nats.
        title: Of our column.
    """
    columns = {}
    for name, scores in (("LoRA", rival), (title, ours)):
        found = calibration_metrics(scores, labels)
        wrong = (scores.argmax(axis=1) != labels).astype(float)
        curve = risk_coverage(predictive_entropy(scores[:, None]), wrong)
        found[f"accuracy of the surest {ANSWERED:.0%}"] = 1 - curve.risk[int(ANSWERED * len(labels)) - 1]
        columns[name] = found
    return pd.DataFrame(columns)


def abstentions(
    ours: Floats, rival: Floats, labels: NDArray[np.integer], texts: Sequence[str], names: Sequence[str]
) -> str:
    """The inputs that we would abstain from first, with what both classifiers say of them."""
    order = np.argsort(-predictive_entropy(ours[:, None]), kind="stable")
    seen: dict[str, int] = {}
    for index in order:
        seen.setdefault(texts[index], int(index))
        if len(seen) == SHOWN:
            break
    lines = ["What BLoB would abstain from first, and how sure LoRA is of it:", ""]
    for text, index in seen.items():
        said = [f"{names[row[index].argmax()]} {np.exp(row[index].max()):.2f}" for row in (ours, rival)]
        lines.append(f"    BLoB {said[0]}, LoRA {said[1]}, truth {names[labels[index]]}: {text}")
    return "\n".join(lines)
