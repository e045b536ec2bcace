"""The artifacts that a run leaves in its folder: metrics, predictions, plots, report and model card."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from blob_hf.cli.costs import COSTS_FILE, training_costs
from blob_hf.cli.held_out import settle_scale
from blob_hf.cli.route import Job, Route
from blob_hf.cli.sentences import kept_sentence, overfitting_sentence
from blob_hf.metrics.samples import NLLCurve
from blob_hf.reporting.classification_plots import (
    plot_nll_curve,
)
from blob_hf.reporting.kl_plots import plot_kl, plot_posterior_std
from blob_hf.reporting.model_card import write_model_card
from blob_hf.reporting.report import REPORT, write_report
from blob_hf.reporting.run_summary import DataSource, Results
from blob_hf.reporting.tables import results_table, to_text
from blob_hf.trainer.engines import require_whole_models, shutdown
from blob_hf.trainer.kl.history import FILE_NAME
from blob_hf.trainer.summary import summarize
from blob_hf.trainer.trainer import BlobTrainer
from blob_hf.utils import files

VERDICT_FILE = "kl_verdict.json"
TRAINED = "train_results.json"  # of a folder whose report is that of its training
EVALUATION = "evaluation_report.md"


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
        if not (self.trainer.was_finished and (self.folder / TRAINED).is_file()):
            self.trainer.save_metrics("train", outcome.metrics())
        self.costs = training_costs(outcome)
        self.trainer.save_state()
        args, state = self.args, self.trainer.state
        if args.load_best_model_at_end:
            said = kept_sentence(
                state.best_global_step, state.global_step, args.metric_for_best_model, state.best_metric
            )
        else:
            said = overfitting_sentence(state.log_history)
        if said:
            self.notes.append(said)
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
