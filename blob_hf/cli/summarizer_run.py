"""What a run of a summarizer leaves: risk against coverage, what more samples buy, examples."""

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

import numpy as np

from blob_hf.baselines.conformal_texts import TextAbstention
from blob_hf.cli.answering import Answering, Answers
from blob_hf.cli.language_run import LanguageRun
from blob_hf.cli.sentences import agreement_sentence, samples_sentence
from blob_hf.cli.summary_decisions import METRICS as ABSTENTION_METRICS
from blob_hf.cli.summary_decisions import abstention_metrics, settle_abstention, withheld, withheld_sentence
from blob_hf.data.summarization import Dialogue
from blob_hf.metrics.agreement import closest_call, marked
from blob_hf.metrics.detection import DETECTION_METRICS, detection_metrics
from blob_hf.metrics.summaries import selective_summarization
from blob_hf.metrics.summarization import rouge_per_example
from blob_hf.reporting.classification_plots import plot_shift
from blob_hf.reporting.generation_plots import SCORES, plot_risk_coverage
from blob_hf.reporting.run_summary import Results
from blob_hf.reporting.tables import results_table
from blob_hf.utils.names import MEAN

SUMMARIZATION_METRICS = ["rouge1", "rouge2", "rougeL", "nll"]


class SummarizerRun(LanguageRun):
    """A `Run` of a summarizer."""

    abstention: TextAbstention | None = None

    def settle_decisions(self, answering: Answering | None, rows: Sequence[Dialogue] | None) -> None:
        """Fit abstention to the rows held out for it and keep it with the adapter; else take the saved one.

        Raises:
            BlobError: There is nothing to fit it to, and none fits that was saved.
        """
        method = self.job.method_args
        if method.conformal_alpha is not None and answering is not None:
            self.abstention = settle_abstention(answering, rows, method, self.folder if self.writes else None)

    def add_summaries(
        self, prefix: str, split: str, metrics: dict[str, float], rows: Sequence[Mapping[str, Any]], scored: bool
    ) -> None:
        """Save what the summaries of a split came to, and draw what their uncertainty tells.

        Args:
            metrics: Of the trainer's `predict`, with ROUGE and the NLL of the references.
            rows: For the file of the summaries.
            scored: Whether there are references.
        """
        if not scored:
            self._add_unreferenced(prefix, metrics, split, len(rows))
            return
        self.add_results(prefix, metrics, split, f"{len(rows)} dialogues")
        self._add_selective(rows, split)
        self.add_samples(metrics[f"{prefix}_mean_nll"], split)
        self._add_sentence(metrics, prefix, rows, split)

    def add_answers(
        self, answering: Answering, prefix: str, split: str, group: Sequence[Dialogue],
        rows: Sequence[dict[str, Any]], others: Mapping[str, Sequence[Dialogue]],
    ) -> None:  # fmt: skip
        """Save what `predict` answers to a split: what abstaining comes to, and whether other texts are told apart.

        Args:
            group: The split's dialogues.
            rows: For the file of their summaries: each gets `answer` and `abstain`, if there is a rule.
            others: Texts of another kind by name.
        """
        answers = answering([dialogue.text for dialogue in group])
        self._add_abstention(answering, answers, group, prefix, split, rows)
        for name, texts in others.items():
            self._add_shift(answering, name, answers, texts)

    def write_summaries(
        self, prefix: str, split: str, rows: Sequence[Mapping[str, Any]], group: Sequence[Dialogue]
    ) -> None:
        """Write the file of a split's summaries, and show some of them."""
        name = "generated_predictions.jsonl" if prefix == "predict" else "eval_generated_predictions.jsonl"
        self.write_rows(name, rows)
        self._add_examples(rows, [dialogue.text for dialogue in group], split)

    def _add_abstention(
        self, answering: Answering, found: Mapping[str, Answers], group: Sequence[Dialogue], prefix: str, split: str,
        rows: Sequence[dict[str, Any]] = (), title: str = "",
    ) -> None:  # fmt: skip
        """Save what abstaining comes to in {prefix}_conformal_results.json, report and card.

        Args:
            found: The answers to a group of inputs.
            rows: For the file of their summaries: each gets `answer` and `abstain`.
        """
        rule = self.abstention
        if rule is None:
            return
        decided, references = withheld(rule, answering, found), [one.references for one in group]
        metrics = {
            f"{prefix}_{kind}{name}": value
            for kind, abstain in decided.items()
            for name, value in abstention_metrics(rule, abstain, found[kind], references).items()
        }
        count = self.num_samples if "" in decided else 0
        self.trainer.save_metrics(f"{prefix}_conformal", metrics | {f"{prefix}_num_samples": count})
        table = results_table(metrics, prefix, ABSTENTION_METRICS, count).dropna(how="all")
        title = f"{title or f'{self.data.name}, {split}'}: abstention ({len(group)} inputs)"
        self.results.append(Results(title, split, table.dropna(how="all", axis="columns"), in_index=False))
        kind = next(iter(decided))
        for row, text, abstain in zip(rows, found[kind].texts, decided[kind], strict=False):
            row |= {"answer": text, "abstain": bool(abstain)}
        if any(references):
            own = {name.removeprefix(f"{prefix}_{kind}"): value for name, value in metrics.items()}
            said = withheld_sentence(rule, own, len(group))
            if split in self.sentences:
                self.sentences[split] += f" {said}"
            else:
                self.notes.append(f"{split}: {said} The guarantee does not reach other texts.")

    def _add_shift(
        self, answering: Answering, name: str, inside: Mapping[str, Answers], group: Sequence[Dialogue]
    ) -> None:
        """Save how well each uncertainty tells other texts from the run's own, in ood_{name}_results.json.

        Args:
            name: Of the other texts.
            inside: The answers to the run's own evaluation split.
            group: The other texts; their summaries are scored where there are any.
        """
        prefix, outside = f"ood_{name}", answering([one.text for one in group])
        references = [one.references for one in group]
        metrics: dict[str, float] = {}
        for kind, own in inside.items():
            for score, values in own.scores.items():
                found = detection_metrics(values, outside[kind].scores[score])
                metrics |= {f"{prefix}_{kind}{score}_{metric}": value for metric, value in found.items()}
            if any(references):
                rouge = rouge_per_example(outside[kind].texts, references)["rougeL"]
                metrics[f"{prefix}_{kind}rougeL"] = float(rouge.mean())
        kind, count = next(iter(inside)), self.num_samples if "" in inside else 0
        self.trainer.save_metrics(prefix, metrics)
        shown = [f"{score}_{metric}" for score in inside[kind].scores for metric in DETECTION_METRICS]
        table = results_table(metrics, prefix, ["rougeL", *shown], count)
        table = table.dropna(how="all").dropna(how="all", axis="columns")
        title = f"out of distribution: {name} ({len(group)} texts)"
        self.results.append(Results(title, name, table, in_index=False))
        rows: list[dict[str, Any]] = [
            {
                "id": one.id,
                "summary": text,
                "references": one.references,
                "uncertainty": {score: float(values[i]) for score, values in outside[kind].scores.items()},
            }
            for i, (one, text) in enumerate(zip(group, outside[kind].texts, strict=True))
        ]
        self._add_abstention(answering, outside, group, prefix, name, rows, title)
        self.write_rows(f"{prefix}_predictions.jsonl", rows)
        titles = {"": f"{count} samples", MEAN: "posterior mean (N=0)"}
        first, second = (
            {titles[key]: answers[key].scores["token_entropy"] for key in reversed(list(answers))}
            for answers in (inside, outside)
        )
        label = "mean entropy of the next token [nats]"
        self.add_plot(prefix, lambda path: plot_shift(first, second, (self.data.name, name), path, label))

    def _add_sentence(
        self, metrics: Mapping[str, float], prefix: str, rows: Sequence[Mapping[str, Any]], split: str
    ) -> None:
        """Say in plain words what an evaluation came to."""
        nlls = metrics[f"{prefix}_nll"], metrics[f"{prefix}_mean_nll"]
        said = samples_sentence(*nlls, self.num_samples, "token"), agreement_sentence(rows)
        self.sentences[split] = " ".join(filter(None, said))

    def _add_unreferenced(self, prefix: str, metrics: dict[str, float], split: str, count: int) -> None:
        """Save {prefix}_results.json of a split without references: how long it took, and no scores."""
        self.trainer.save_metrics(prefix, metrics | {f"{prefix}_num_samples": self.num_samples})
        self.notes.append(f"{split}: {count} summaries are written; without references they have no ROUGE and no NLL")

    def _add_selective(self, rows: Sequence[Mapping[str, Any]], split: str) -> None:
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

    def _add_examples(self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], split: str) -> None:
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
