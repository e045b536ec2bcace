"""What a run came to in plain words, from its own numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blob_hf.metrics.selective import risk_coverage
from blob_hf.metrics.uncertainty import predictive_entropy

WANTED = 0.95  # accuracy that the share of abstentions is told for
FEWEST = 20  # inputs that must remain for their accuracy to mean something
NOTHING = 0.01  # relative change of an NLL that is none
RISEN = 0.05  # relative rise of an NLL from its least that is overfitting


def samples_sentence(nll: float, mean_nll: float, num_samples: int, unit: str) -> str:
    """What samples do to the NLL.

    Args:
        nll, mean_nll: Of the samples' predictive and of the posterior mean, nats.
        num_samples: 0 where there are none.
        unit: What the NLL is the mean over, "example" or "token".
    """
    if not (np.isfinite(nll) and np.isfinite(mean_nll)):
        return "The NLL is not a finite number: the model predicts nothing of use."
    if not num_samples:
        return f"The NLL is {mean_nll:.3g} nats per {unit}."
    who = "One sample" if num_samples == 1 else f"{num_samples} samples"
    verb = "s" if num_samples == 1 else ""
    if abs(nll - mean_nll) <= NOTHING * abs(mean_nll):
        both = f"{nll:.4g} nats per {unit} with and {mean_nll:.4g} without sampling"
        return f"{who} change{verb} nothing: the NLL is {both}."
    better = "improve" if nll < mean_nll else "worsen"
    return f"{who} {better}{verb} the NLL from {mean_nll:.3g} (posterior mean) to {nll:.3g} nats per {unit}."


def overfitting_sentence(history: Sequence[Mapping[str, Any]]) -> str:
    """That a training went on past its best evaluation; "" where it did not, or where there were fewer than two.

    Args:
        history: Of the trainer's state: what was logged, with its step.
    """
    seen = [(row["eval_nll"], row["step"]) for row in history if np.isfinite(row.get("eval_nll", np.nan))]
    if len(seen) < 2:
        return ""
    (least, step), (last, end) = min(seen), seen[-1]
    if last <= (1 + RISEN) * least:
        return ""
    return (
        f"the model overfits: the NLL of the evaluated rows was least at step {step:,} of {end:,}, {least:.3g}, and "
        f"ended at {last:.3g}. Train for less, or hold training rows out and stop by them (--early_stopping_patience 5)"
    )


def kept_sentence(step: int | None, end: int, metric: str | None, value: float | None) -> str:
    """Which step's adapter a training has kept, where it keeps the best; "" where it is that of the last.

    Args:
        step: Of the best evaluation; None where there was none.
        end: The step that the training ended at.
        metric, value: By which it was the best.
    """
    if step is None or value is None or step >= end:
        return ""
    return (
        f"the adapter is that of step {step:,}, the best by {metric} ({value:.3g}); the training ended at step {end:,}"
    )


def networks_sentence(networks: NDArray[np.integer], most: int) -> str:
    """How many networks inputs took where they take as many as they need.

    Args:
        networks: Of each input.
        most: That an input could have taken.
    """
    few, count = int(networks.min()), int((networks == networks.min()).sum())
    every = int((networks == most).sum())
    return (
        f"inputs took {networks.mean():.1f} networks on average; {count} of {len(networks)} were settled with {few}, "
        f"{every} took all {most}"
    )


def abstention_sentence(log_probs: NDArray[np.floating], labels: NDArray[np.integer]) -> str:
    """How many inputs a classifier has to leave open, the least certain ones, to be right on the rest.

    Args:
        log_probs: Of the predictive, `(examples, classes)`, nats.
    """
    if not np.isfinite(log_probs.max(axis=1)).all():
        return ""
    wrong = (log_probs.argmax(axis=1) != labels).astype(float)
    accuracy = 1 - wrong.mean()
    if len(wrong) < FEWEST:
        return f"Its accuracy is {accuracy:.1%} on these {len(wrong)} rows, too few to say more."
    if accuracy >= WANTED:
        return f"It answers all inputs with {accuracy:.1%} accuracy."
    curve = risk_coverage(predictive_entropy(log_probs[:, None]), wrong)
    enough = np.flatnonzero((1 - curve.risk >= WANTED) & (np.arange(1, len(wrong) + 1) >= FEWEST))
    if not len(enough):
        return (
            f"Its accuracy is {accuracy:.1%}, and its uncertainty is no help to reach {WANTED:.0%} by abstaining: the "
            "surest inputs are not right that often."
        )
    open_ = 1 - curve.coverage[enough[-1]]
    return (
        f"Its accuracy is {accuracy:.1%}; abstaining on the least certain {open_:.0%} of the inputs would leave the "
        f"rest with {WANTED:.0%} accuracy on these rows."
    )


def agreement_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """How good the summaries are on which the samples agree; "" where there is nothing to compare."""
    if len(rows) < 4 or "uncertainty" not in rows[0]:
        return ""
    doubts = np.array([row["uncertainty"]["dissimilarity"] for row in rows])
    scores = np.array([row.get("summary_scores", row["mean_scores"])["rougeL"] for row in rows])
    surest = scores[np.argsort(doubts, kind="stable")[: len(rows) // 2]].mean()
    if np.ptp(doubts) == 0:
        return f"The samples agree on every summary as much as on any other (ROUGE-L {scores.mean():.3f})."
    best = f"ROUGE-L {surest:.3f}, all have {scores.mean():.3f}"
    return f"The half of the summaries that the samples agree on most has {best}."
