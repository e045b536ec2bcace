"""--conformal_alpha of a classifier: the rows that its decisions are fitted to, and what they come to on others."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from numpy.typing import NDArray
from scipy.special import log_softmax

from blob_hf.baselines.conformal import PredictionSets
from blob_hf.baselines.conformal_fit import check_score, fit_thresholds, require_mapie
from blob_hf.baselines.fitted_rules import check_rows, fitted_to
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.route import Route
from blob_hf.data.summarization import group_dialogues
from blob_hf.inference.answers import set_names
from blob_hf.inference.decisions import ClassDecisions, Floats
from blob_hf.inference.predict import class_log_probs
from blob_hf.metrics.coverage import class_decisions, coverage_interval, covered, decision_metrics
from blob_hf.reporting.class_tables import MANY, class_cell
from blob_hf.reporting.class_tables import SHOWN as MANY_SHOWN
from blob_hf.reporting.run_summary import Results
from blob_hf.reporting.tables import results_table
from blob_hf.tuner.model import BlobModel
from blob_hf.utils.errors import BlobError
from blob_hf.utils.names import MEAN

logger = logging.getLogger(__name__)

ROWS = "conformal"  # the split
METRICS = ["coverage", "set_size", "empty_sets", "answered", "answered_error"]


def hold_out_decisions(splits: DatasetDict, route: Route, method_args: MethodArguments, classes: bool = True) -> None:
    """Give decisions the held-out rows, in place: all of them, or half where something else is fitted to some, too.

    (A temperature or a scale that has seen a row makes its probabilities better than a new row's.)

    Args:
        classes: Whether they are of classes, which MAPIE fits.

    Raises:
        BlobError: There are too few, the score is not for their classes, or MAPIE is not installed.
    """
    alpha = method_args.conformal_alpha
    if alpha is None or "calibration" not in splits:
        return
    if classes:
        require_mapie()
    held_out: Dataset = splits.pop("calibration")
    inputs = None if classes else list(held_out["dialogue"])
    if route.holds_out(replace(method_args, conformal_alpha=None)) and len(set(inputs or range(len(held_out)))) > 1:
        splits["calibration"], held_out = _halves(held_out, inputs)
        logger.info("of the held-out rows %d are for decisions alone", len(held_out))
    check_rows(len(held_out) if classes else len(group_dialogues(held_out)), alpha)
    if classes:
        check_score(held_out["label"], method_args.conformal_score)
    splits[ROWS] = held_out


def _halves(rows: Dataset, inputs: Sequence[str] | None) -> tuple[Dataset, Dataset]:
    """Two halves by chance.

    Args:
        inputs: Of rows that may be references of one input: these stay together.
    """
    if inputs is None:
        parts = rows.train_test_split(test_size=0.5, seed=0)
        return parts["train"], parts["test"]
    distinct = list(dict.fromkeys(inputs))
    second = {distinct[index] for index in np.random.default_rng(0).permutation(len(distinct))[len(distinct) // 2 :]}
    chosen = [text in second for text in inputs]
    return rows.select(np.flatnonzero(~np.array(chosen))), rows.select(np.flatnonzero(chosen))


def drop_decisions(model: BlobModel, slot: str, folder: Path | None) -> None:
    """Forget decisions that were fitted to probabilities which are others now.

    Args:
        slot: Of the companion.
        folder: Of the run, whose file goes, too; None: of another process.
    """
    stale = model.companions.get(str(model.active_adapter), {}).pop(slot, None)
    if stale is not None:
        logger.warning("the adapter's %s hold no more and are dropped: fit them again with conformal_alpha", stale.name)
        if folder is not None:
            for name in stale.files:
                (folder / name).unlink(missing_ok=True)


def require_saved(saved: Any, kind: type[Any], method_args: MethodArguments, names: Sequence[str]) -> None:
    """Check that an adapter has decisions that were asked for, where there are no rows to fit any to.

    Args:
        saved: Its companion.
        kind: Of the companion.
        names: Of what they were asked for with, as the companion's fields and `conformal_*` of the arguments.

    Raises:
        BlobError: It has none, or was fitted for another alpha, or whatever is named.
    """
    if not isinstance(saved, kind):
        raise BlobError(
            "conformal_alpha: the adapter was saved without such decisions, and there are no held-out rows to fit them "
            "to; give --calibration_file, or train with it"
        )
    for name in names:
        own, asked = getattr(saved, name), getattr(method_args, f"conformal_{name}")
        if own != asked:
            raise BlobError(
                f"conformal_{name}: the adapter's decisions were fitted with {own}, not {asked}; ask for that, or give "
                "--calibration_file to fit them again"
            )


def settle_sets(trainer: Any, rows: Any, method_args: MethodArguments, folder: Path | None) -> PredictionSets:
    """Prediction sets of a trainer's model: fitted to held-out rows, or those that it was saved with.

    Args:
        folder: Where to save them; None: nowhere.

    Raises:
        BlobError: There are neither.
    """
    model, sampling = trainer.blob_model, trainer.eval_sampling
    if rows is not None:
        output = trainer.predict(rows, metric_key_prefix=ROWS)
        alpha, delta, score = (getattr(method_args, f"conformal_{name}") for name in ("alpha", "delta", "score"))
        labels = np.asarray(output.label_ids)
        kinds = [False, True] if sampling.num_samples else [False]
        found = [
            fit_thresholds(predicted(model, output.predictions, sampled), labels, alpha, delta, score)
            for sampled in kinds
        ]
        sets = PredictionSets(
            alpha, delta, score, len(labels), found[0], found[1] if len(found) > 1 else None, fitted_to(model, sampling)
        )
        model.set_companion(sets)
        if folder is not None:
            sets.save(model, folder)
    saved = model.companion(PredictionSets.slot)
    require_saved(saved, PredictionSets, method_args, ("alpha", "delta", "score"))
    return saved


def predicted(model: BlobModel, predictions: Any, sampled: bool) -> Floats:
    """Class probabilities `(examples, classes)` as `model.predict` gives them.

    Args:
        predictions: `ClassPredictions` of a trainer.
        sampled: Of the samples, or of the posterior mean.
    """
    own = predictions.sample_log_probs if sampled else predictions.mean_log_probs[:, None]
    return np.exp(class_log_probs(model, log_softmax(np.asarray(own, dtype=np.float64), axis=-1), sampled))


@dataclass(frozen=True)
class Decided:
    """Decisions on the rows of an evaluation, by the kind of predictive: "" of the samples, "mean_" of the mean.

    Attributes:
        labels: Class ids, `(examples,)`; None where they are not known.
    """

    sets: PredictionSets
    found: Mapping[str, tuple[ClassDecisions, Floats]]
    labels: NDArray[np.integer] | None

    @classmethod
    def of(cls, sets: PredictionSets, trainer: Any, output: Any) -> "Decided":
        """Of what `trainer.predict` gave for the rows."""
        drawn, model = trainer.eval_sampling, trainer.blob_model
        found = {}
        for kind, sampling in (("", drawn), (MEAN, replace(drawn, num_samples=0))):
            if kind == MEAN or drawn.num_samples:
                probabilities = predicted(model, output.predictions, sampled=kind == "")
                decided = sets.decide(model, probabilities, sampling)
                if decided is not None:
                    found[kind] = decided, probabilities
        return cls(sets, found, None if output.label_ids is None else np.asarray(output.label_ids))

    @property
    def shown(self) -> tuple[ClassDecisions, Floats]:
        """The decisions of the run's predictive, and its probabilities."""
        return next(iter(self.found.values()))

    def row(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        """For the file of predictions."""
        decided, probabilities = self.shown
        chosen = set_names(decided.sets[index : index + 1], probabilities[index : index + 1], names)[0]
        return {"prediction_set": chosen, "abstain": bool(decided.abstain[index])}

    def metrics(self, prefix: str) -> dict[str, float]:
        """`decision_metrics` of each kind."""
        return {
            f"{prefix}_{kind}{name}": value
            for kind, (decided, probabilities) in self.found.items()
            for name, value in decision_metrics(
                decided.sets, decided.abstain, probabilities.argmax(axis=1), self.labels
            ).items()
        }

    def tables(self, title: str, split: str, prefix: str, num_samples: int, names: Sequence[str]) -> list[Results]:
        """For report and card: of all rows, and where labels are known of each class, the least covered first."""
        (decided, probabilities), count = self.shown, len(self.shown[1])
        level = f"at most {self.sets.alpha:g} wrong"
        whole = results_table(self.metrics(prefix), prefix, METRICS, num_samples)
        whole = whole.dropna(how="all").dropna(how="all", axis="columns")
        found = [Results(f"{title}: decisions, {level} ({count} examples)", split, whole, in_index=False)]
        if self.labels is not None:
            cells = [class_cell(name) for name in names]
            table = class_decisions(
                decided.sets, decided.abstain, probabilities.argmax(axis=1), self.labels, cells
            ).sort_values("coverage", kind="stable")
            which = f"the {MANY_SHOWN} classes that are covered least" if len(table) > MANY else "class by class"
            shown = table.head(MANY_SHOWN) if len(table) > MANY else table
            found.append(Results(f"{title}: decisions, {which}", split, shown, in_index=False))
        return found

    def sentence(self) -> str:
        """How many rows have their class in the set, and how many would have by chance; labels are known."""
        assert self.labels is not None
        decided, _ = self.shown
        share = covered(decided.sets, self.labels).mean()
        low, high = coverage_interval(len(self.labels), self.sets.rows, self.sets.alpha)
        return (
            f"The prediction sets hold the class of {share:.1%} of {len(self.labels)} examples, "
            f"{decided.sets.sum(axis=1).mean():.2f} classes on average; {1 - self.sets.alpha:.0%} was aimed at, and "
            f"with {self.sets.rows} held-out rows {low:.1%} to {high:.1%} is within chance for rows like these."
        )
