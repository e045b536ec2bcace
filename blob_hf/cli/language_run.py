"""What a run of a language model leaves: NLL and perplexity, and what more samples buy."""

from typing import Any

import numpy as np

from blob_hf.cli.artifacts import Run
from blob_hf.cli.sentences import samples_sentence
from blob_hf.metrics.samples import NLLCurve

LANGUAGE_METRICS = ["nll", "perplexity"]


class LanguageRun(Run):
    """A `Run` of a language model."""

    def add_scores(self, prefix: str, output: Any, split: str, count: int) -> None:
        """Save the metrics of a split, say in plain words what they came to, and draw the NLL by samples.

        Args:
            output: Of the trainer's `predict`.
            count: Rows of the split.
        """
        metrics = dict(output.metrics)
        self.add_results(prefix, metrics, split, f"{count} rows")
        mean_nll = metrics[f"{prefix}_mean_nll"]
        self.sentences[split] = samples_sentence(metrics[f"{prefix}_nll"], mean_nll, self.num_samples, "token")
        self.add_samples(mean_nll, split)

    def add_samples(self, mean_nll: float, split: str) -> None:
        """Draw the NLL of the references by the number of samples, from the last scoring of a split."""
        if self.num_samples and self.trainer.nll_by_samples is not None:
            nll = np.asarray(self.trainer.nll_by_samples, dtype=float)
            curve = NLLCurve(np.arange(1, len(nll) + 1), nll, np.zeros_like(nll))
            self.add_nll_curve(curve, mean_nll, split, "token")
