"""What a run of a summarizer leaves: risk against coverage, what more samples buy, examples."""

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

import numpy as np

from blob_hf.cli.language_run import LanguageRun
from blob_hf.cli.sentences import agreement_sentence, samples_sentence
from blob_hf.metrics.agreement import closest_call, marked
from blob_hf.metrics.summaries import selective_summarization
from blob_hf.reporting.generation_plots import SCORES, plot_risk_coverage

SUMMARIZATION_METRICS = ["rouge1", "rouge2", "rougeL", "nll"]


class SummarizerRun(LanguageRun):
    """A `Run` of a summarizer."""

    def add_sentence(
        self, metrics: Mapping[str, float], prefix: str, rows: Sequence[Mapping[str, Any]], split: str
    ) -> None:
        """Say in plain words what an evaluation came to."""
        nlls = metrics[f"{prefix}_nll"], metrics[f"{prefix}_mean_nll"]
        said = samples_sentence(*nlls, self.num_samples, "token"), agreement_sentence(rows)
        self.sentences[split] = " ".join(filter(None, said))

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
