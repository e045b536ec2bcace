"""What a run of multiple choice says of its questions: which arguments do not fit them, and what they cannot show."""

import dataclasses
import logging
from typing import Any

from datasets import Dataset

from blob_hf.inference.choices import ChoiceScoring

logger = logging.getLogger(__name__)

_ASKING = {"scoring": "scoring", "length_normalization": "normalization", "max_length": "max_length"}
_ALIKE = 0.25  # choices a question, between two sets of them


def warn_of_unread_asking(data_args: Any, scoring: ChoiceScoring, saved: bool) -> None:
    """Name the arguments of how to ask that are not read.

    Args:
        data_args: Dataclass with scoring, length_normalization and max_length.
        scoring: How the run asks.
        saved: Whether that is the saved adapter's.
    """
    defaults = {one.name: one.default for one in dataclasses.fields(data_args)}
    for name, field in _ASKING.items():
        wanted, found = getattr(data_args, name), getattr(scoring, field)
        if saved and wanted not in (found, defaults[name]):
            logger.warning("--%s %s is not read: the adapter was trained with %s", name, wanted, found)
    if scoring.scoring == "letter" and not saved and scoring.normalization != "none":
        logger.warning("--length_normalization is not read: it is of --scoring text, a letter has no length")


def width_note(name: str, other: Dataset, own: Dataset) -> str | None:
    """Whether two sets of questions differ in their numbers of choices, which their uncertainty then shows.

    Args:
        name: Of the other set.
        own: The evaluation's.
    """
    theirs, ours = (sum(map(len, rows["choices"])) / len(rows) for rows in (other, own))
    if abs(theirs - ours) < _ALIKE:
        return None
    return (
        f"{name} has {theirs:.3g} choices a question, the evaluation {ours:.3g}: among fewer choices the entropy is "
        "lower and the largest probability higher, whatever the network knows; AUROC, AUPR and FPR95 say little here"
    )
