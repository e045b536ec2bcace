"""Experiment IV: how summaries vary with the weights, and how with the decoding.

Published setting ([K], see docs/experiments.md): 100 dialogues x 100 samples; there BLoB sampled weights and decoded
greedily while LoRA sampled tokens. Here both are crossed: {posterior mean, sample} x {greedy, token sampling}.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState

from blob_hf import cli
from blob_hf.data.summarization import Dialogue
from blob_hf.experiments import units
from blob_hf.experiments.arms import ARMS, PEERS, summaries
from blob_hf.experiments.scores import AGGREGATES, METRIC_NAMES, metrics_of, score_rows
from blob_hf.experiments.setup import (
    DEMO,
    ExperimentArguments,
    Summarizers,
    load_dialogues,
    make_scorer,
    start,
)
from blob_hf.experiments.statistics import best_of, compare, decompose, mean_interval, sizes_up_to
from blob_hf.metrics.similarity import minimum_bayes_risk, pairwise, rouge_utility
from blob_hf.reporting.generation_plots import plot_curves, plot_densities
from blob_hf.reporting.tables import markdown_table
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

_COMPARED = [
    ("blob-sample-greedy", "lora-sampling", "the published comparison: weight noise against token noise"),
    ("blob-mean-greedy", "lora-greedy", "no noise"),
    ("blob-mean-sampling", "lora-sampling", "token noise in both"),
    ("blob-sample-greedy", "blob-mean-greedy", "what weight noise does, greedy"),
    ("blob-sample-sampling", "blob-mean-sampling", "what weight noise does beside token noise"),
    *(("blob-sample-greedy", f"{peer}-sample-greedy", f"BLoB's weights against those of {peer}") for peer in PEERS),
    *((f"{peer}-sample-greedy", f"{peer}-mean-greedy", f"what the weights of {peer} do, greedy") for peer in PEERS),
]


@dataclass
class SamplingArguments(ExperimentArguments):
    """Experiment IV: the cross of weights and decoding."""

    mc_dropout: str | None = field(default=None, metadata={"help": "MC-dropout adapter to compare with, if any."})
    ensemble: str | None = field(default=None, metadata={"help": "Ensemble to compare with, if any."})
    tfb: str | None = field(default=None, metadata={"help": "TFB adapter to compare with, if any."})
    num_dialogues: int = field(default=100, metadata={"help": "Dialogues, from the start of the test split."})
    num_samples: int = field(default=100, metadata={"help": "Summaries of each dialogue and arm."})
    arms: list[str] | None = field(
        default=None, metadata={"help": "Arms to run. Default: all of the adapters given.", "choices": list(ARMS)}
    )
    top_k: int = field(default=50, metadata={"help": "Token sampling from the k likeliest; 0: from all."})
    posterior_batch_size: int | None = field(
        default=None, metadata={"help": "Samples generated together. Default: all."}
    )
    mbr_samples: int = field(default=32, metadata={"help": "Samples in the minimum Bayes risk curve, at most."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for arm in self.arms or []:
            method = ARMS[arm].method
            if method in PEERS and getattr(self, method) is None:
                raise BlobError(f"--arms {arm} needs an adapter: give --{method}")
        for name in ("num_samples", "mbr_samples"):
            if getattr(self, name) < 1:
                raise BlobError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.top_k < 0 or (self.posterior_batch_size is not None and self.posterior_batch_size < 1):
            raise BlobError("top_k must be >= 0 and posterior_batch_size >= 1")


def main(argv: Sequence[str]) -> None:
    """Generate every arm, score, decompose, plot, report."""
    demo = {**DEMO, "num_samples": 12}
    (args,) = cli.parse_arguments((SamplingArguments,), demo, __doc__ or "", argv)
    folder = start(args, "sampling", ignored=("arms", "mbr_samples"))
    dialogues = load_dialogues(args)
    arms = args.arms or [name for name, arm in ARMS.items() if getattr(args, arm.method) is not None]
    keys = [(arm, index) for arm in arms for index in range(len(dialogues))]
    summarizers = Summarizers(args, dialogues)

    def make(key: units.Key) -> list[units.Row]:
        arm, index = key
        summarizer, prompts = summarizers(ARMS[arm].method)
        ids = torch.tensor([prompts[index]], device=summarizer.model.device)
        name = dialogues[index].id
        with torch.no_grad():
            tokens = summaries(
                summarizer.model, ids, arm, name,
                Sampling(args.num_samples, args.seed, batch_size=args.posterior_batch_size),
                args.max_new_tokens, args.top_k,
            )  # fmt: skip
        texts = summarizer.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [{"dialogue": name, "arm": arm, "sample": s, "text": text.strip()} for s, text in enumerate(texts)]

    units.complete(folder, keys, make)
    if PartialState().is_main_process:
        _report(args, folder, dialogues, keys)


def _report(args: SamplingArguments, folder: Path, dialogues: Sequence[Dialogue], keys: Sequence[units.Key]) -> None:
    references = {dialogue.id: dialogue.references for dialogue in dialogues}
    scorer = make_scorer(args, folder)
    table = score_rows(list(units.read(folder, keys)), references, scorer)
    files.write_text(folder / "samples.jsonl", table.to_json(orient="records", lines=True, force_ascii=False))
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    shown = {name: METRIC_NAMES[name] for name in metrics_of(table)}
    for aggregate in AGGREGATES:
        columns = {f"{name}_{aggregate}": label for name, label in shown.items()}
        plot_densities(table, columns, f"{aggregate} over references", plots / f"density_{aggregate}.png")
    curves = sample_curves(table, args.mbr_samples, args.seed)
    plot_curves(curves, "ROUGE-L (best of the references)", plots / "more_samples.png")
    text = report_text(table, curves, args, len(dialogues), scorer.description if scorer else "no BERTScore")
    files.write_text(folder / "report.md", text)
    print(text)
    print(f"Everything is in {folder}")


def sample_curves(table: pd.DataFrame, mbr_samples: int, seed: int, draws: int = 32) -> pd.DataFrame:
    """ROUGE-L of the best of n samples, and of the one that minimum Bayes risk picks, over n, by arm.

    `best` needs the references: it bounds what choosing can reach. `mbr` does not know them; it is averaged over
    `draws` random subsets of the samples.

    Returns:
        Columns arm, kind ("best" or "mbr"), samples, value (mean over dialogues).
    """
    rows = []
    rng = np.random.default_rng(seed)
    for arm, part in table.groupby("arm", sort=False):
        groups = [group for _, group in part.groupby("dialogue", sort=False)]
        count = min(len(group) for group in groups)
        if count < 2:
            continue
        for size in sizes_up_to(count):
            value = np.mean([best_of(group["rougeL_max"], size) for group in groups])
            rows.append({"arm": arm, "kind": "best", "samples": size, "value": value})
        limit = min(count, mbr_samples)
        chosen: dict[int, list[float]] = {size: [] for size in sizes_up_to(limit)}
        for group in groups:
            scores = group["rougeL_max"].to_numpy()[:limit]
            similarities = pairwise(group["text"].tolist()[:limit], rouge_utility())
            for size, values in chosen.items():
                for _ in range(draws):
                    picked = rng.choice(limit, size, replace=False)
                    best = minimum_bayes_risk(similarities[np.ix_(picked, picked)]).index
                    values.append(float(scores[picked[best]]))
        rows += [
            {"arm": arm, "kind": "mbr", "samples": size, "value": float(np.mean(values))}
            for size, values in chosen.items()
        ]
    return pd.DataFrame(rows, columns=["arm", "kind", "samples", "value"])


def report_text(table: pd.DataFrame, curves: pd.DataFrame, args: SamplingArguments, count: int, bertscore: str) -> str:
    """report.md: what the cross shows, from the numbers, with intervals over dialogues."""
    metrics = metrics_of(table)
    means = table.groupby(["arm", "dialogue"], sort=False)[[f"{m}_{a}" for m in metrics for a in AGGREGATES]].mean()
    parts = [
        "# Experiment IV: weights and decoding, crossed",
        f"{count} dialogues x {args.num_samples} samples an arm; token sampling from the {args.top_k or 'whole'} "
        f"likeliest tokens; at most {args.max_new_tokens} new tokens. {bertscore}. An arm without noise has one "
        "summary a dialogue. Intervals are 95 % bootstrap intervals over dialogues.",
        *(_scores_table(means, metrics, aggregate, args.seed) for aggregate in AGGREGATES),
        "## Comparisons on the same dialogues (best of the references)",
        "\n".join(_comparisons(means, metrics, args.seed)),
        "## Where the spread comes from",
        *_decompositions(table, metrics, args.seed),
        "## More samples",
        _curves_table(curves),
        "\n\n".join(f"![{name}](plots/{name}.png)" for name in (*(f"density_{a}" for a in AGGREGATES), "more_samples")),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _scores_table(means: pd.DataFrame, metrics: Sequence[str], aggregate: str, seed: int) -> str:
    rows = [
        [arm, *(mean_interval(means.loc[arm, f"{name}_{aggregate}"], seed) for name in metrics)]
        for arm in dict.fromkeys(means.index.get_level_values("arm"))
    ]
    table = markdown_table(["arm", *(METRIC_NAMES[name] for name in metrics)], rows)
    return f"## Scores: {aggregate} over references\n\n{table}"


def _comparisons(means: pd.DataFrame, metrics: Sequence[str], seed: int) -> list[str]:
    arms = set(means.index.get_level_values("arm"))
    lines = []
    for first, second, what in _COMPARED:
        if {first, second} <= arms:
            for name in metrics:
                scores = means[f"{name}_max"]
                found = compare(scores.xs(first), scores.xs(second), seed)
                lines.append(
                    f"- {what}: {METRIC_NAMES[name]} of {first} is {found.verdict} than that of {second}: {found}"
                )
    return [line.replace("not shown to differ than that of", "not shown to differ from that of") for line in lines]


def _decompositions(table: pd.DataFrame, metrics: Sequence[str], seed: int) -> list[str]:
    found: Mapping[str, pd.DataFrame | None] = {name: decompose(table, f"{name}_max", seed) for name in metrics}
    lines = []
    for name, rows in found.items():
        if rows is None:
            return ["(needs the arms blob-sample-greedy, blob-mean-sampling and blob-sample-sampling)"]
        cells = [
            [
                source,
                f"{row['variance']:.5f}",
                "" if np.isnan(row["low"]) else f"[{row['low']:.5f}, {row['high']:.5f}]",
                f"{row['share']:.1%}",
            ]
            for source, row in rows.iterrows()
        ]
        shown = markdown_table(("source", "variance", "95 % interval", "share"), cells)
        lines.append(f"**{METRIC_NAMES[name]}**\n\n{shown}")
        weights, decoding = rows.loc["weights"], rows.loc["decoding"]
        if weights["low"] > decoding["high"]:
            lines.append(f"{METRIC_NAMES[name]} varies more with the weights than with the tokens.")
        elif decoding["low"] > weights["high"]:
            lines.append(f"{METRIC_NAMES[name]} varies more with the tokens than with the weights.")
        else:
            lines.append(f"For {METRIC_NAMES[name]} neither source is shown to be the larger.")
    return lines


def _curves_table(curves: pd.DataFrame) -> str:
    if curves.empty:
        return ""
    wide = curves.pivot_table(index=["arm", "kind"], columns="samples", values="value", sort=False)
    rows = [
        [*key, *("" if np.isnan(value) else f"{value:.4f}" for value in values)]
        for key, values in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return (
        "ROUGE-L, best of the references; `best` knows them, `mbr` (minimum Bayes risk) does not.\n\n"
        + markdown_table(["arm", "choice", *(f"n={n}" for n in wide.columns)], rows)
    )
