"""What the page shows of a classifier's answer, from its `Prediction`; plain values, without HTML."""

from dataclasses import dataclass

from blob_hf.app.beside import Evaluation
from blob_hf.inference.answers import Prediction

SHOWN_CLASSES = 10  # of many


@dataclass(frozen=True)
class ClassRow:
    """A class: its probability under the predictive and under the posterior mean, and those of the samples.

    Attributes:
        std: Of the samples' probabilities.
    """

    name: str
    probability: float
    std: float
    samples: tuple[float, ...]
    mean: float


@dataclass(frozen=True)
class ClassView:
    """An answer, the likeliest classes first.

    Attributes:
        others: Probability of the classes that are not among `rows`; 0 where all are.
        entropy, aleatoric, epistemic: Nats, as of `Prediction`.
        num_samples: Networks that were drawn; 0 for the posterior mean.
        is_calibrated: Whether a temperature has changed `entropy`, so that it is not the sum of its parts.
        mean_label, mean_confidence, mean_entropy: What the posterior mean (N=0) answers.
    """

    label: str
    confidence: float
    rows: tuple[ClassRow, ...]
    others: float
    other_count: int
    entropy: float
    aleatoric: float
    epistemic: float
    num_samples: int
    is_calibrated: bool
    mean_label: str
    mean_confidence: float
    mean_entropy: float


def class_view(found: Prediction, mean: Prediction, num_samples: int, is_calibrated: bool = False) -> ClassView:
    """The view of one input.

    Args:
        found: Of the predictive, of one input.
        mean: Of the posterior mean, of the same.
        num_samples: That `found` was asked for; 0 if it is a point's.
    """
    probabilities, samples = found.probabilities[0], found.sample_probabilities[0]
    order = (-probabilities).argsort(kind="stable")
    shown = order[:SHOWN_CLASSES]
    rows = tuple(
        ClassRow(
            found.class_names[index], float(probabilities[index]), float(found.std[0, index]),
            tuple(map(float, samples[:, index])) if num_samples else (), float(mean.probabilities[0, index]),
        )
        for index in shown
    )  # fmt: skip
    return ClassView(
        found.labels[0], float(found.confidence[0]), rows, float(probabilities[order[SHOWN_CLASSES:]].sum()),
        len(order) - len(shown), float(found.entropy[0]), float(found.aleatoric[0]), float(found.epistemic[0]),
        len(samples) if num_samples else 0, is_calibrated, mean.labels[0], float(mean.confidence[0]),
        float(mean.entropy[0]),
    )  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """Whether to answer at a threshold, and what that threshold does on the evaluation set.

    Attributes:
        answers: The entropy is at most the threshold, as of `blob predict --abstain_above`.
        rows, coverage, accuracy, accuracy_of_all: Of the evaluation set; rows is 0 where none is known.
        split, num_samples: Which rows, and how many networks were drawn for them.
    """

    answers: bool | None
    threshold: float
    rows: int = 0
    coverage: float = 0.0
    accuracy: float = 0.0
    accuracy_of_all: float = 0.0
    split: str = ""
    num_samples: int | None = None


def decide(entropy: float | None, threshold: float, evaluation: Evaluation | None) -> Decision:
    """The decision for an entropy in nats; None before there is one."""
    answers = None if entropy is None else entropy <= threshold
    if evaluation is None:
        return Decision(answers, threshold)
    chosen, everything = evaluation.at(threshold), evaluation.at(float("inf"))
    return Decision(
        answers, threshold, len(evaluation), chosen.coverage, 1 - chosen.risk, 1 - everything.risk,
        evaluation.split, evaluation.num_samples,
    )  # fmt: skip
