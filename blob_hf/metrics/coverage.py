"""What prediction sets and abstention are worth on labelled inputs: coverage, set sizes, errors among the answered."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import betabinom

Bools = NDArray[np.bool_]
Labels = NDArray[np.integer]


def decision_metrics(sets: Bools, abstain: Bools, predicted: Labels, labels: Labels | None = None) -> dict[str, float]:
    """Shares of inputs.

    Args:
        sets: Prediction sets, `(inputs, classes)`.
        abstain: Whether an input is not answered, `(inputs,)`.
        predicted: Likeliest classes, `(inputs,)`.
        labels: Class ids `(inputs,)`. None: what needs labels is left out.

    Returns:
        set_size, the mean; empty_sets; answered; with labels coverage, the share whose class is in the set, and
        answered_error, the share of the answered inputs that are wrong (NaN where none is answered).
    """
    found = {
        "set_size": float(sets.sum(axis=1).mean()),
        "empty_sets": float((~sets.any(axis=1)).mean()),
        "answered": float((~abstain).mean()),
    }
    if labels is None:
        return found
    wrong = predicted != labels
    errors = float(wrong[~abstain].mean()) if (~abstain).any() else float("nan")
    return {"coverage": float(covered(sets, labels).mean()), **found, "answered_error": errors}


def covered(sets: Bools, labels: Labels) -> Bools:
    """Whether each input's class is in its set, `(inputs,)`."""
    return sets[np.arange(len(labels)), labels]


def class_decisions(
    sets: Bools, abstain: Bools, predicted: Labels, labels: Labels, names: Sequence[str]
) -> pd.DataFrame:
    """`decision_metrics` of the inputs of each class, with their number as `rows`; classes without inputs are left out.

    Args:
        names: Of the classes, in the order of their ids.
    """
    rows = {}
    for index, name in enumerate(names):
        own = labels == index
        if own.any():
            found = decision_metrics(sets[own], abstain[own], predicted[own], labels[own])
            rows[name] = {"rows": int(own.sum()), **{key: found[key] for key in _OF_CLASSES}}
    return pd.DataFrame.from_dict(rows, orient="index")


_OF_CLASSES = ("coverage", "set_size", "answered", "answered_error")


def coverage_interval(inputs: int, rows: int, alpha: float, level: float = 0.95) -> tuple[float, float]:
    """Where the coverage of new inputs lies by chance, if they are exchangeable with the held-out rows.

    Their number that is covered is beta-binomial with a = k, b = rows + 1 - k, k = ceil((rows + 1)(1 - alpha)) where no
    two conformity scores are equal (Vovk, 2012): both the held-out rows and the inputs are drawn.

    Args:
        inputs: New ones.
        rows: Held-out ones.
        level: Probability of the central interval.
    """
    rank = math.ceil(round((rows + 1) * (1 - alpha), 9))
    ends = betabinom.ppf([(1 - level) / 2, (1 + level) / 2], inputs, rank, rows + 1 - rank) / inputs
    return float(ends[0]), float(ends[1])
