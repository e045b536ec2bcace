"""The artifacts that a run leaves in its folder: metrics, predictions, plots, report and model card."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import numpy as np

from blob_hf.baselines.temperature import Temperatures, fit_temperature, scale
from blob_hf.cli.comparison import abstentions, comparison_table
from blob_hf.cli.costs import COSTS_FILE, training_costs
from blob_hf.cli.held_out import settle_scale
from blob_hf.cli.routes import Job, Route
from blob_hf.cli.sentences import abstention_sentence, agreement_sentence, samples_sentence
from blob_hf.metrics.agreement import closest_call, marked
from blob_hf.metrics.calibration import calibration_metrics, confidence, reliability_bins
from blob_hf.metrics.classification import class_report, rejection_curves
from blob_hf.metrics.detection import detection_report
from blob_hf.metrics.samples import NLLCurve, nll_curve
from blob_hf.metrics.summaries import selective_summarization
from blob_hf.metrics.uncertainty import predictive_entropy
from blob_hf.reporting.class_tables import class_section
from blob_hf.reporting.classification_plots import (
    plot_confidence,
    plot_nll_curve,
    plot_rejection,
    plot_reliability,
    plot_shift,
)
from blob_hf.reporting.generation_plots import SCORES, plot_risk_coverage
from blob_hf.reporting.kl_plots import plot_kl, plot_posterior_std
from blob_hf.reporting.model_card import write_model_card
from blob_hf.reporting.report import REPORT, write_report
from blob_hf.reporting.run_summary import DataSource, Results
from blob_hf.reporting.tables import results_table, to_text
from blob_hf.trainer.engines import require_whole_models, shutdown
from blob_hf.trainer.kl.history import FILE_NAME
from blob_hf.trainer.predictions import ClassPredictions
from blob_hf.trainer.summary import summarize
from blob_hf.trainer.trainer import BlobTrainer
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

VERDICT_FILE = "kl_verdict.json"
TRAINED = "train_results.json"  # of a folder whose report is that of its training
EVALUATION = "evaluation_report.md"
CLASSIFICATION_METRICS = ["accuracy", "macro_f1", "ece", "nll", "brier"]
SUMMARIZATION_METRICS = ["rouge1", "rouge2", "rougeL", "nll"]


class Run:
    """Trains through a trainer and leaves the artifacts of a run in its output folder.

    Args:
        route: How the method trains, or fits.
        job: What the training needs.
        trainer: A `BlobTrainer` or `BlobSeq2SeqTrainer` with the model to start with.
        base_model: Hub id or folder of the base model.
        data: The data, for titles and the model card.
        task: Its tag on the Hub, "text-classification" or "summarization".
        metric_names: Metrics of the final table, in order.
        settings: Hyperparameters for report and model card, beyond the training arguments'.
    """

    def __init__(
        self,
        route: Route,
        job: Job,
        trainer: BlobTrainer,
        base_model: str,
        data: DataSource,
        task: str,
        metric_names: list[str],
        settings: Mapping[str, Any],
        license: str | None = None,
    ) -> None:
        self.route, self.job = route, job
        self.trainer, self.args = trainer, trainer.args
        self.folder = Path(str(trainer.args.output_dir))
        self.data, self.metric_names = data, metric_names
        self.trained = False
        self.results: list[Results] = []
        self.plots: list[str] = []
        self.notes: list[str] = []
        self.sections: list[str] = []
        self.examples: list[str] = []
        self.sentences: dict[str, str] = {}  # by split
        self.costs: dict[str, float] = {}
        self._facts: dict[str, Any] = {"base_model": base_model, "task": task, "settings": settings, "license": license}
        trainer.card_from_run = True
        if job.method_args.posterior_scale is not None:
            require_whole_models(trainer.accelerator, "posterior_scale")

    @property
    def writes(self) -> bool:
        """Whether this process writes files."""
        return self.args.should_save

    @property
    def sentence(self) -> str:
        """What the run came to in plain words: of its first evaluation."""
        return next((f"On {self.data.name} ({split}): {said}" for split, said in self.sentences.items()), "")

    @property
    def num_samples(self) -> int:
        """Networks that an evaluation draws; 0 for a point."""
        return self.trainer.eval_sampling.num_samples

    def train(self) -> None:
        """Train, or resume if asked to; leave the adapter, train_results.json, kl_history.csv, plots/kl.png, state."""
        self.trained = True
        outcome = self.route.train(self.job, self.trainer)
        self.trainer.save_model()
        self.trainer.save_metrics("train", outcome.metrics())
        self.costs = training_costs(outcome)
        self.trainer.save_state()
        if self.trainer.kl_verdict is not None:
            self.add_plot("kl", lambda path: plot_kl(self.folder / FILE_NAME, path))
            self._draw_stds()

    def scale(self) -> None:
        """Scale the posterior, if asked to, and save it if it was trained here."""
        if self.job.method_args.posterior_scale is None:
            return
        start = time.perf_counter()
        settle_scale(self.trainer, self.job.method_args, self.job.calibration_rows)
        if self.trained:
            self.costs["fit_runtime"] = self.costs.get("fit_runtime", 0.0) + time.perf_counter() - start
            self.trainer.save_model()
            self._draw_stds()

    def _draw_stds(self) -> None:
        model = self.trainer.blob_model
        if model.has_posterior:
            layers, prior_std = model.posterior_statistics().layers, model.blob_config.prior_std
            self.add_plot("posterior_std", lambda path: plot_posterior_std(layers, prior_std, path))

    def add_results(
        self, prefix: str, metrics: dict[str, float], split: str, rows: str = "", provisional: bool = False
    ) -> None:
        """Save {prefix}_results.json, with the number of samples N, and keep the table N=0 beside N=S for the end.

        Args:
            rows: What was evaluated, for the title, for example "408 examples".
            provisional: Whether the model is not yet the adapter that will be saved: left out of the card's index.
        """
        self.trainer.save_metrics(prefix, metrics | {f"{prefix}_num_samples": self.num_samples})
        if self.costs and f"{prefix}_runtime" in metrics:
            self.costs |= {"eval_runtime": metrics[f"{prefix}_runtime"], "networks": self.num_samples}
            self.costs["eval_rows"] = round(metrics[f"{prefix}_runtime"] * metrics[f"{prefix}_samples_per_second"])
        table = results_table(metrics, prefix, self.metric_names, self.num_samples)
        title = f"{self.data.name}, {split}" + (f" ({rows})" if rows else "")
        title = f"before training: {title}" if prefix == "base" else title
        self.results.append(Results(title, split, table, in_index=not provisional))

    def add_plot(self, name: str, draw: Callable[[Path], object]) -> None:
        """Draw plots/{name}.png."""
        if self.writes:
            path = self.folder / "plots" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(path)
            if f"plots/{name}.png" not in self.plots:
                self.plots.append(f"plots/{name}.png")

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a JSON Lines file, whole or not at all."""
        if self.writes:
            files.write_text(self.folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def finish(self) -> None:
        """Write report.md and the model card of a run that trained, push if asked, print the tables."""
        if self.writes:
            if self.costs:
                files.write_text(self.folder / COSTS_FILE, json.dumps(self.costs, indent=2) + "\n")
            summary = summarize(self.trainer, self.data, **self._facts)
            summary.results, summary.plots = self.results, self.plots
            summary.notes, summary.examples, summary.sentence = self.notes, self.examples, self.sentence
            summary.sections = self.sections
            if not self.trained:  # an evaluation does not know how the adapter was trained: the card stays
                write_report(self.folder, summary, EVALUATION if (self.folder / TRAINED).is_file() else REPORT)
            else:
                if self.trainer.kl_verdict is not None:
                    verdict = json.dumps(self.trainer.kl_verdict.to_dict(), indent=2)
                    files.write_text(self.folder / VERDICT_FILE, verdict + "\n")
                write_report(self.folder, summary)
                write_model_card(self.folder, summary)
            if self.sentence:
                print(f"\n{self.sentence}")
            for results in self.results:
                print(to_text(results.table, f"{self.route.name}: {results.title}"))
            for example in self.examples:
                print(f"{example}\n")
            for note in self.notes:
                print(note)
            judged = self.trainer.kl_verdict if self.trained else None
            if judged is not None:
                print(f"\n{judged}")
                print("".join(f"  {name:<42} {value}\n" for name, value in judged.figures.shown().items()))
            print(f"Everything is in {self.folder}")
        if self.args.push_to_hub:
            self.trainer.push_to_hub()
        shutdown(self.trainer.accelerator)

    def add_nll_curve(self, curve: NLLCurve, mean_nll: float, split: str, unit: str) -> None:
        """Draw what more samples buy, and note how many are enough."""
        if len(curve.samples) > 1:
            name = "nll_by_samples" if split == "validation" else f"nll_by_samples_{split}"
            self.add_plot(name, lambda path: plot_nll_curve(curve, mean_nll, path, unit))
            count, everything = curve.enough, curve.samples[-1]
            few = "1 sample is" if count == 1 else f"{count} samples are"
            said = f"{few} as good as all {everything} ({split}): the NLL is within 1 % of theirs"
            self.notes.append(said)


Inputs = Sequence[Mapping[str, Any]]


class ClassifierRun(Run):
    """A `Run` of a classifier."""

    temperatures: Temperatures | None = None

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
            if self.writes:
                Temperatures(*found).save(model, self.folder)
        saved = model.companion(Temperatures.slot)
        if not isinstance(saved, Temperatures):
            raise BlobError(
                "temperature_scaling: the adapter was saved without temperatures; fit them with --do_train "
                "--temperature_scaling, which holds training rows out"
            )
        self.temperatures = saved

    def _add_scaled(self, prefix: str, split: str, output: Any) -> None:
        """Results with the temperatures, in {prefix}_temperature_results.json."""
        if self.temperatures is None:
            return
        log_probs, _, mean = output.predictions
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
        log_probs, samples, mean = output.predictions
        labels, num_samples = output.label_ids, self.num_samples
        self._write_predictions(split, log_probs, mean, labels, inputs)
        if labels is None:
            self.trainer.save_metrics(prefix, output.metrics | {f"{prefix}_num_samples": num_samples})
            self.notes.append(
                f"{split}: {len(mean)} rows without labels were predicted, not scored: {split}_predictions.jsonl"
            )
            return
        self.add_results(prefix, output.metrics, split, f"{len(mean)} examples")
        self._add_scaled(prefix, split, output)
        nlls = output.metrics[f"{prefix}_nll"], output.metrics[f"{prefix}_mean_nll"]
        said = samples_sentence(*nlls, num_samples, "example"), abstention_sentence(log_probs, labels)
        self.sentences[split] = " ".join(filter(None, said))
        shown = {"posterior mean (N=0)": mean} | ({f"{num_samples} samples": log_probs} if num_samples else {})
        suffix = "" if split == "validation" else f"_{split}"
        bins = {title: reliability_bins(scores, labels) for title, scores in shown.items()}
        self.add_plot(f"reliability{suffix}", lambda path: plot_reliability(bins, path))
        sure = {title: confidence(scores, labels) for title, scores in shown.items()}
        self.add_plot(f"confidence{suffix}", lambda path: plot_confidence(sure, path))
        curves = rejection_curves(samples, mean, labels)
        self.add_plot(f"accuracy_rejection{suffix}", lambda path: plot_rejection(curves, path))
        if num_samples:
            curve = nll_curve(samples, labels, self.args.antithetic)
            self.add_nll_curve(curve, output.metrics[f"{prefix}_mean_nll"], split, "example")
        report = class_report(log_probs, labels, self.class_names)
        title = f"Classes: {self.data.name}, {split}, N={num_samples}"
        self.sections.append(class_section(title, report.table, report.confusion))

    def add_unscaled(self, split: str, output: Any) -> None:
        """Save what a split's predictions were before the posterior is scaled, so that one sees what the scale does."""
        log_probs, _, mean = output.predictions
        self.add_results("unscaled", output.metrics, f"{split}, posterior not scaled", f"{len(mean)} examples", True)
        self._write_predictions(f"unscaled_{split}", log_probs, mean, output.label_ids)

    def _write_predictions(self, name: str, log_probs: Any, mean: Any, labels: Any | None, inputs: Inputs = ()) -> None:
        """A row for each input: the most probable class by its name, and all log-probabilities.

        Args:
            labels: Class ids, None where they are not known.
        """
        names = self.class_names

        def row(index: int) -> dict[str, Any]:
            scores = log_probs[index]
            best = int(scores.argmax())
            found = {"prediction": names[best], "probability": float(np.exp(scores[best]))}
            if labels is not None:
                found |= {"label": int(labels[index]), "label_name": names[int(labels[index])]}
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
        log_probs, _, mean = outside.predictions
        count = len(mean)
        self.results.append(Results(f"out of distribution: {name} ({count} examples)", name, table, in_index=False))
        self._write_predictions(prefix, log_probs, mean, outside.label_ids)
        own, other = ({title: pair[i] for title, pair in reversed(scores.items())} for i in (0, 1))
        self.add_plot(prefix, lambda path: plot_shift(own, other, (self.data.name, name), path))


class SummarizerRun(Run):
    """A `Run` of a summarizer."""

    def add_sentence(
        self, metrics: Mapping[str, float], prefix: str, rows: Sequence[Mapping[str, Any]], split: str
    ) -> None:
        """Say in plain words what an evaluation came to."""
        nlls = metrics[f"{prefix}_nll"], metrics[f"{prefix}_mean_nll"]
        said = samples_sentence(*nlls, self.num_samples, "token"), agreement_sentence(rows)
        self.sentences[split] = " ".join(filter(None, said))

    def add_samples(self, mean_nll: float, split: str) -> None:
        """Draw the NLL of the references by the number of samples, from the last scoring of a split."""
        if self.num_samples and self.trainer.nll_by_samples is not None:
            nll = np.asarray(self.trainer.nll_by_samples, dtype=float)
            curve = NLLCurve(np.arange(1, len(nll) + 1), nll, np.zeros_like(nll))
            self.add_nll_curve(curve, mean_nll, split, "token")

    def add_unreferenced(self, prefix: str, metrics: dict[str, float], split: str, count: int) -> None:
        """Save {prefix}_results.json of a split without references: how long it took, and no scores."""
        self.trainer.save_metrics(prefix, metrics | {f"{prefix}_num_samples": self.num_samples})
        self.notes.append(f"{split}: {count} summaries are written; without references they have no ROUGE and no NLL")

    def add_selective(self, rows: Sequence[Mapping[str, Any]], split: str) -> None:
        """Draw risk against coverage for each uncertainty score of generated summaries, and keep the ratios."""
        if self.num_samples and len(rows) > 1 and "uncertainty" in rows[0]:
            curves, ratios = selective_summarization(rows)
            self.add_plot(
                f"risk_coverage_{split}", lambda path: plot_risk_coverage(curves, "error: 1 - ROUGE-L of those", path)
            )
            shown = ", ".join(f"{SCORES.get(name, name)} {value:.3f}" for name, value in ratios.items())
            if any(np.isnan(value) for value in ratios.values()):
                shown = "undefined, because all summaries are equally good: there is nothing to tell apart"
            self.notes.append(
                f"prediction-rejection ratios ({split}): {shown} (1: the worst are rejected first, 0: any)"
            )

    def add_examples(self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], split: str) -> None:
        """Show the dialogue that the networks agree on most, one that divides them over a word, and the one least.

        Args:
            texts: The dialogues, in the order of the rows.
        """
        if self.num_samples < 2 or len(rows) < 2 or "uncertainty" not in rows[0]:
            return
        doubts = [row["uncertainty"]["dissimilarity"] for row in rows]
        chosen: dict[str, int | None] = {
            "agree most": int(np.argmin(doubts)),
            "are divided over a word or two": closest_call(
                [row["mean_summary"] for row in rows], [row["samples"] for row in rows]
            ),
            "disagree most": int(np.argmax(doubts)),
        }
        for title, index in chosen.items():
            if index is not None:
                lines = [f"Where the {self.num_samples} networks {title} ({split}, {rows[index]['id']}):", ""]
                lines += [f"    {line}" for line in texts[index].splitlines()]
                self.examples.append("\n".join([*lines, "", *_summaries(rows[index])]))


def _summaries(row: Mapping[str, Any]) -> list[str]:
    """The mean's summary with what divides the samples marked, and three of the samples, different ones first."""
    samples = list(dict.fromkeys(row["samples"])) + list(row["samples"])
    lines = [f"    mean:     {marked(row['mean_summary'], row['samples'])}"]
    return lines + [
        f"    sample {number}: {shorten(text, 150, placeholder=' ...')}"
        for number, text in enumerate(samples[:3], start=1)
    ]
