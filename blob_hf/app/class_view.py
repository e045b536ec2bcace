"""What the page shows of a classifier's answer, from its `Prediction`; plain values, without HTML."""

from collections.abc import Sequence
from dataclasses import dataclass

from blob_hf.app.beside import Evaluation
from blob_hf.app.promises import Promise
from blob_hf.baselines.conformal import PredictionSets
from blob_hf.inference.answers import Prediction, set_names

SHOWN_CLASSES = 10  # of many


@dataclass(frozen=True)
class ClassRow:
    """A class: its probability under the predictive and under the posterior mean, and those of the samples.

    Attributes:
        std: Of the samples' probabilities.
        in_set: Whether it is in the prediction set; False also where none was fitted.
    """

    name: str
    probability: float
    std: float
    samples: tuple[float, ...]
    mean: float
    in_set: bool = False


@dataclass(frozen=True)
class FittedDecisions:
    """What the rules that were fitted to the adapter decide on an answer.

    Attributes:
        promise: What is promised of them for this answer.
        made: Whether there are any for it: those of the posterior mean alone say nothing of samples.
        prediction_set: Names of the classes that cannot be ruled out, likeliest first.
        coverage: Share of the inputs whose class was to be in the set.
        abstains: Whether the input is better left to a person.
        confidence: Of the likeliest class.
        answered_from: The confidence from which on inputs are answered; None: no threshold could be promised.
    """

    promise: Promise
    made: bool
    prediction_set: tuple[str, ...] = ()
    coverage: float = 0.0
    abstains: bool = False
    confidence: float = 0.0
    answered_from: float | None = None


@dataclass(frozen=True)
class ClassView:
    """An answer, the likeliest classes first.

    Attributes:
        kind: What classes are called: "class" or "choice".
        others: Probability of the classes that are not among `rows`; 0 where all are.
        entropy, aleatoric, epistemic: Nats, as of `Prediction`.
        num_samples: Networks that were drawn; 0 for the posterior mean.
        is_calibrated: Whether a temperature has changed `entropy`, so that it is not the sum of its parts.
        mean_label, mean_confidence, mean_entropy: What the posterior mean (N=0) answers.
        fitted: Decisions by what was fitted to the adapter; None where nothing was.
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
    fitted: FittedDecisions | None = None
    kind: str = "class"


def class_view(
    found: Prediction, mean: Prediction, num_samples: int, is_calibrated: bool = False,
    fitted: FittedDecisions | None = None, choices: Sequence[str] | None = None,
) -> ClassView:  # fmt: skip
    """The view of one input.

    Args:
        found: Of the predictive, of one input.
        mean: Of the posterior mean, of the same.
        num_samples: That `found` was asked for; 0 if it is a point's.
        fitted: `fitted_decisions` of it.
        choices: What the choices of a question are called, which may have fewer than the adapter has answers; None:
            classes.
    """
    names = list(choices or found.class_names)
    probabilities, samples = found.probabilities[0, : len(names)], found.sample_probabilities[0]
    if found.networks is not None:  # as many as it needed, which stand first
        samples = samples[: found.networks[0]]
    order = (-probabilities).argsort(kind="stable")
    shown = order[:SHOWN_CLASSES]
    rows = tuple(
        ClassRow(
            names[index], float(probabilities[index]), float(found.std[0, index]),
            tuple(map(float, samples[:, index])) if num_samples else (), float(mean.probabilities[0, index]),
            found.decisions is not None and bool(found.decisions.sets[0, index]),
        )
        for index in shown
    )  # fmt: skip
    return ClassView(
        names[int(found.label_ids[0])], float(found.confidence[0]), rows,
        float(probabilities[order[SHOWN_CLASSES:]].sum()), len(order) - len(shown), float(found.entropy[0]),
        float(found.aleatoric[0]), float(found.epistemic[0]),
        len(samples) if num_samples else 0, is_calibrated, names[int(mean.label_ids[0])], float(mean.confidence[0]),
        float(mean.entropy[0]), fitted, "class" if choices is None else "choice",
    )  # fmt: skip


def fitted_decisions(
    found: Prediction, rule: PredictionSets | None, promise: Promise | None, sampled: bool,
    choices: Sequence[str] | None = None,
) -> FittedDecisions | None:  # fmt: skip
    """What was decided on one input by what was fitted to the adapter; None where nothing was.

    Args:
        found: Of `BlobModel.predict`, which has asked the rule.
        sampled: Whether it is of samples, or of the posterior mean.
        choices: As of `class_view`.
    """
    if rule is None or promise is None:
        return None
    thresholds = rule.predictive if sampled else rule.mean
    if found.decisions is None or thresholds is None:
        return FittedDecisions(promise, made=False)
    names = list(choices or found.class_names)
    own = set_names(found.decisions.sets[:, : len(names)], found.probabilities[:, : len(names)], names)[0]
    return FittedDecisions(
        promise, True, tuple(own), 1 - rule.alpha, bool(found.decisions.abstain[0]),
        float(found.confidence[0]), thresholds.confidence,
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
