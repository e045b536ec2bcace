"""What a run of a classifier leaves: predictions by class name, calibration, plots, tables of its classes."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from blob_hf.baselines.conformal import PredictionSets
from blob_hf.baselines.temperature import Temperatures, fit_temperature, scale
from blob_hf.cli.artifacts import Run
from blob_hf.cli.comparison import abstentions, comparison_table
from blob_hf.cli.decisions import Decided, drop_decisions, settle_sets
from blob_hf.cli.sentences import abstention_sentence, networks_sentence, samples_sentence
from blob_hf.metrics.calibration import calibration_metrics, confidence, reliability_bins
from blob_hf.metrics.classification import class_report, rejection_curves
from blob_hf.metrics.detection import detection_report
from blob_hf.metrics.samples import nll_curve
from blob_hf.metrics.uncertainty import predictive_entropy
from blob_hf.reporting.class_tables import class_section
from blob_hf.reporting.classification_plots import (
    plot_confidence,
    plot_rejection,
    plot_reliability,
    plot_shift,
)
from blob_hf.reporting.run_summary import Results
from blob_hf.reporting.tables import results_table
from blob_hf.trainer.predictions import ClassPredictions
from blob_hf.utils.errors import BlobError

CLASSIFICATION_METRICS = ["accuracy", "macro_f1", "ece", "nll", "brier"]


Inputs = Sequence[Mapping[str, Any]]


class ClassifierRun(Run):
    """A `Run` of a classifier."""

    temperatures: Temperatures | None = None
    sets: PredictionSets | None = None

    def calibrate(self) -> None:
        """Fit temperatures to the held-out rows and keep them with the adapter; without training, take the saved ones.

        Raises:
            BlobError: There is nothing to fit them to, and none was saved.
        """
        model, rows = self.trainer.blob_model, self.job.calibration_rows
        if rows is not None:
            output = self.trainer.predict(rows, metric_key_prefix="calibration")
            self.trainer.save_metrics("calibration", output.metrics)
            predictions, labels = cast(ClassPredictions, output.predictions), np.asarray(output.label_ids)
            found = [fit_temperature(scores, labels) for scores in (predictions.log_probs, predictions.mean_log_probs)]
            model.set_companion(Temperatures(*found))
            drop_decisions(model, PredictionSets.slot, self.folder if self.writes else None)
            if self.writes:
                Temperatures(*found).save(model, self.folder)
        saved = model.companion(Temperatures.slot)
        if not isinstance(saved, Temperatures):
            raise BlobError(
                "temperature_scaling: the adapter was saved without temperatures; fit them with --do_train "
                "--temperature_scaling, which holds training rows out"
            )
        self.temperatures = saved

    def settle_decisions(self) -> None:
        """Fit prediction sets to the rows held out for them and keep them with the adapter; else take the saved ones.

        Raises:
            BlobError: There is nothing to fit them to, and none fit that were saved.
        """
        method, rows = self.job.method_args, self.job.conformal_rows
        if method.conformal_alpha is None:
            return
        if rows is None and not self.trained and isinstance(method.posterior_scale, float):
            raise BlobError(
                "conformal_alpha: posterior_scale makes other samples than the adapter's decisions were fitted to; "
                "give --calibration_file to fit them again"
            )
        self.sets = settle_sets(self.trainer, rows, method, self.folder if self.writes else None)

    def _decide(self, prefix: str, split: str, title: str, output: Any) -> Decided | None:
        """Decisions on rows, with what they come to in {prefix}_conformal_results.json, report and card."""
        if self.sets is None:
            return None
        decided = Decided.of(self.sets, self.trainer, output)
        self.trainer.save_metrics(
            f"{prefix}_conformal", decided.metrics(prefix) | {f"{prefix}_num_samples": self.num_samples}
        )
        self.results += decided.tables(title, split, prefix, self.num_samples, self.class_names)
        return decided

    def _add_scaled(self, prefix: str, split: str, output: Any) -> None:
        """Results with the temperatures, in {prefix}_temperature_results.json."""
        if self.temperatures is None:
            return
        log_probs, _, mean = output.predictions[:3]
        kinds = {"": (log_probs, self.temperatures.predictive), "mean_": (mean, self.temperatures.mean)}
        metrics: dict[str, float] = {}
        for kind, (values, temperature) in kinds.items():
            scaled = calibration_metrics(scale(values, temperature), output.label_ids)
            metrics |= {f"{prefix}_{kind}{metric}": value for metric, value in scaled.items()}
            metrics[f"{prefix}_{kind}temperature"] = temperature
        count = self.num_samples
        self.trainer.save_metrics(f"{prefix}_temperature", metrics | {f"{prefix}_num_samples": count})
        table = results_table(metrics, prefix, [*self.metric_names, "temperature"], count)
        title = f"{self.data.name}, {split}, temperature-scaled"
        table = table.dropna(how="all").dropna(how="all", axis="columns")
        self.results.append(Results(title, split, table, in_index=False))

    @property
    def class_names(self) -> list[str]:
        """Of the classes, in the order of their ids."""
        config: Any = self.trainer.blob_model.get_base_model().config
        return [config.id2label[index] for index in range(config.num_labels)]

    def add_predictions(self, prefix: str, split: str, output: Any, inputs: Inputs = ()) -> None:
        """Save metrics and predictions of a split, and draw what they show; without labels the predictions alone.

        Args:
            output: Of `BlobTrainer.predict`: log_probs, sample_log_probs, mean_log_probs.
            inputs: What tells its rows from one another, to write beside their predictions.
        """
        log_probs, samples, mean = output.predictions[:3]
        labels, num_samples = output.label_ids, self.num_samples
        networks = output.predictions.networks
        if labels is not None:
            self.add_results(prefix, output.metrics, split, f"{len(mean)} examples")
            self._add_scaled(prefix, split, output)
        decided = self._decide(prefix, split, f"{self.data.name}, {split}", output)
        self._write_predictions(split, log_probs, mean, labels, inputs, networks, decided)
        if networks is not None:
            self.notes.append(
                f"{split}: {networks_sentence(networks, num_samples)} ({split}_predictions.jsonl says which)"
            )
        if labels is None:
            self.trainer.save_metrics(prefix, output.metrics | {f"{prefix}_num_samples": num_samples})
            self.notes.append(
                f"{split}: {len(mean)} rows without labels were predicted, not scored: {split}_predictions.jsonl"
            )
            return
        nlls = output.metrics[f"{prefix}_nll"], output.metrics[f"{prefix}_mean_nll"]
        said = samples_sentence(*nlls, num_samples, "example"), abstention_sentence(log_probs, labels)
        self.sentences[split] = " ".join(filter(None, (*said, decided.sentence() if decided else "")))
        shown = {"posterior mean (N=0)": mean} | ({f"{num_samples} samples": log_probs} if num_samples else {})
        suffix = "" if split == "validation" else f"_{split}"
        bins = {title: reliability_bins(scores, labels) for title, scores in shown.items()}
        self.add_plot(f"reliability{suffix}", lambda path: plot_reliability(bins, path))
        sure = {title: confidence(scores, labels) for title, scores in shown.items()}
        self.add_plot(f"confidence{suffix}", lambda path: plot_confidence(sure, path))
        curves = rejection_curves(samples, mean, labels)
        self.add_plot(f"accuracy_rejection{suffix}", lambda path: plot_rejection(curves, path))
        if num_samples and networks is None:
            curve = nll_curve(samples, labels, self.args.sampling.in_pairs)
            self.add_nll_curve(curve, output.metrics[f"{prefix}_mean_nll"], split, "example")
        report = class_report(log_probs, labels, self.class_names)
        title = f"Classes: {self.data.name}, {split}, N={num_samples}"
        self.sections.append(class_section(title, report.table, report.confusion))

    def add_unscaled(self, split: str, output: Any) -> None:
        """Save what a split's predictions were before the posterior is scaled, so that one sees what the scale does."""
        log_probs, _, mean = output.predictions[:3]
        self.add_results("unscaled", output.metrics, f"{split}, posterior not scaled", f"{len(mean)} examples", True)
        self._write_predictions(f"unscaled_{split}", log_probs, mean, output.label_ids)

    def _write_predictions(
        self, name: str, log_probs: Any, mean: Any, labels: Any | None, inputs: Inputs = (),
        networks: Any | None = None, decided: Decided | None = None,
    ) -> None:  # fmt: skip
        """A row for each input: the most probable class by its name, and all log-probabilities.

        Args:
            labels: Class ids, None where they are not known.
            networks: How many each input took, where that is as many as needed.
            decided: Their prediction sets, and which of them are not answered.
        """
        names = self.class_names

        def row(index: int) -> dict[str, Any]:
            scores = log_probs[index]
            best = int(scores.argmax())
            found = {"prediction": names[best], "probability": float(np.exp(scores[best]))}
            if labels is not None:
                found |= {"label": int(labels[index]), "label_name": names[int(labels[index])]}
            if networks is not None:
                found["networks"] = int(networks[index])
            found |= {} if decided is None else decided.row(index, names)
            found |= {"log_probs": scores.tolist(), "mean_log_probs": mean[index].tolist()}
            return {**(inputs[index] if inputs else {}), **found}

        rows = ({"index": index, **row(index)} for index in range(len(mean)))
        self.write_rows(f"{name}_predictions.jsonl", rows)

    def add_comparison(self, ours: Any, rival: Any, texts: Sequence[str], names: Sequence[str]) -> None:
        """Show this run beside plain LoRA on the same rows, and the inputs that it would abstain from.

        Args:
            ours, rival: Outputs of `BlobTrainer.predict` with labels.
            texts: The inputs.
            names: Of the classes.
        """
        scores, others, labels = ours.predictions.log_probs, rival.predictions.log_probs, np.asarray(ours.label_ids)
        self.trainer.save_metrics("lora", rival.metrics)
        table = comparison_table(scores, others, labels, f"{self.route.name}, N={self.num_samples}")
        title = f"{self.data.name}, validation: against plain LoRA, all else equal"
        self.results.append(Results(title, "validation", table, in_index=False))
        self.examples.append(abstentions(scores, others, labels, texts, names))

    def add_shift(self, name: str, inside: Any, outside: Any) -> None:
        """Save how well uncertainty tells other data from the run's own, in ood_{name}_results.json.

        Args:
            name: Of the other data.
            inside: Output of `BlobTrainer.predict` on the run's own evaluation split.
            outside: The same on the other data; with metrics of its own if its labels mean the same.
        """
        prefix = f"ood_{name}"
        metrics = dict(outside.metrics or {})
        reports = {"": "sample_log_probs"} if self.num_samples else {}
        scores: dict[str, tuple[Any, Any]] = {}
        for kind, field in (reports | {"mean_": "mean_log_probs"}).items():
            pair = [getattr(output.predictions, field) for output in (inside, outside)]
            own, other = pair if kind == "" else [np.expand_dims(one, 1) for one in pair]
            metrics |= {f"{prefix}_{kind}{key}": value for key, value in detection_report(own, other).items()}
            title = f"{self.num_samples} samples" if kind == "" else "posterior mean (N=0)"
            scores[title] = predictive_entropy(own), predictive_entropy(other)
        self.trainer.save_metrics(prefix, metrics)
        kinds = ("entropy", "max_prob", "mutual_information")
        detected = [f"{kind}_{metric}" for kind in kinds for metric in ("auroc", "aupr", "fpr95")]
        shifted = [metric for metric in CLASSIFICATION_METRICS if f"{prefix}_mean_{metric}" in metrics]
        table = results_table(metrics, prefix, shifted + detected, self.num_samples)
        table = table.dropna(how="all").dropna(how="all", axis="columns")
        log_probs, _, mean = outside.predictions[:3]
        count = len(mean)
        self.results.append(Results(f"out of distribution: {name} ({count} examples)", name, table, in_index=False))
        decided = self._decide(prefix, name, f"out of distribution: {name}", outside)
        self._write_predictions(prefix, log_probs, mean, outside.label_ids, decided=decided)
        if decided is not None and decided.labels is not None:
            self.notes.append(f"{name}: {decided.sentence()} The guarantee does not reach other data.")
        own, other = ({title: pair[i] for title, pair in reversed(scores.items())} for i in (0, 1))
        self.add_plot(prefix, lambda path: plot_shift(own, other, (self.data.name, name), path))
