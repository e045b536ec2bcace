"""Experiment III: the posterior mean with beam search, BLoB against LoRA.

Published setting ([K], see docs/experiments.md): beam 4, length penalty 1.0, up to 128 new tokens, 500 test dialogues,
the best of 3 references, mean +- std over dialogues.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState

from blob_hf import cli
from blob_hf.data.summarization import Dialogue
from blob_hf.experiments import units
from blob_hf.experiments.scores import METRIC_NAMES, metrics_of, score_rows
from blob_hf.experiments.setup import (
    DEMO,
    METHODS,
    ExperimentArguments,
    Summarizer,
    Summarizers,
    load_dialogues,
    make_scorer,
    start,
)
from blob_hf.experiments.statistics import Comparison, compare
from blob_hf.inference.generate import generate_mean
from blob_hf.reporting.tables import markdown_table
from blob_hf.utils import files

# [K], experiment III: BART-base on DialogSum, 12,500 steps; BERTScore of deberta-xlarge-mnli, rescaled
PUBLISHED = {
    "blob": {"bertscore": (0.459, 0.163), "rouge1": (0.487, 0.141), "rouge2": (0.239, 0.167), "rougeL": (0.409, 0.151)},
    "lora": {"bertscore": (0.459, 0.158), "rouge1": (0.482, 0.132), "rouge2": (0.231, 0.152), "rougeL": (0.401, 0.142)},
}


@dataclass
class MeanArguments(ExperimentArguments):
    """Experiment III: beam search with the posterior mean."""

    num_beams: int = field(default=4, metadata={"help": "Beams."})
    length_penalty: float = field(default=1.0, metadata={"help": "Length penalty."})
    batch_size: int = field(default=8, metadata={"help": "Dialogues generated together."})


def main(argv: Sequence[str]) -> None:
    """Generate, score, compare, report."""
    (args,) = cli.parse_arguments((MeanArguments,), DEMO, __doc__ or "", argv)
    folder = start(args, "mean")
    dialogues = load_dialogues(args)
    keys = [(method, first) for method in METHODS for first in range(0, len(dialogues), args.batch_size)]
    summarizers = Summarizers(args, dialogues)

    def make(key: units.Key) -> list[units.Row]:
        method, first = key
        summarizer, prompts = summarizers(method)
        batch = slice(first, first + args.batch_size)
        texts = _summaries(summarizer, prompts[batch], args)
        return [
            {"dialogue": dialogue.id, "arm": method, "sample": 0, "text": text}
            for dialogue, text in zip(dialogues[batch], texts, strict=True)
        ]

    units.complete(folder, keys, make)
    if PartialState().is_main_process:
        _report(args, folder, dialogues, keys)


def _summaries(summarizer: Summarizer, prompts: list[list[int]], args: MeanArguments) -> list[str]:
    batch = summarizer.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(summarizer.model.device)
    with torch.no_grad():
        tokens = generate_mean(
            summarizer.model,
            {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
            num_beams=args.num_beams,
            length_penalty=args.length_penalty,
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
        )
    texts = summarizer.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _report(args: MeanArguments, folder: Path, dialogues: Sequence[Dialogue], keys: Sequence[units.Key]) -> None:
    references = {dialogue.id: dialogue.references for dialogue in dialogues}
    scorer = make_scorer(args, folder)
    table = score_rows(list(units.read(folder, keys)), references, scorer)
    files.write_text(folder / "summaries.jsonl", table.to_json(orient="records", lines=True, force_ascii=False))
    summary, comparisons = summarize(table, args.seed)
    note = scorer.description if scorer else "no BERTScore"
    text = _text(args, len(dialogues), summary, comparisons, note)
    files.write_text(folder / "report.md", text)
    print(text)
    print(f"Everything is in {folder}")


def summarize(table: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, dict[str, Comparison]]:
    """Mean and std over dialogues of each method's best-of-references scores, and BLoB - LoRA, by metric."""
    metrics = metrics_of(table)
    by_method = {method: table[table["arm"] == method].set_index("dialogue") for method in METHODS}
    columns = {
        (method, part): [getattr(rows[f"{name}_max"], part)() for name in metrics]
        for method, rows in by_method.items()
        for part in ("mean", "std")
    }
    comparisons = {
        name: compare(
            by_method["blob"][f"{name}_max"], by_method["lora"].loc[by_method["blob"].index, f"{name}_max"], seed
        )
        for name in metrics
    }
    return pd.DataFrame(columns, index=metrics), comparisons


def _text(args: MeanArguments, count: int, summary: pd.DataFrame, comparisons: dict[str, Comparison], note: str) -> str:
    rows = [
        [
            METRIC_NAMES[name],
            *(f"{summary.loc[name, (m, 'mean')]:.3f} +- {summary.loc[name, (m, 'std')]:.3f}" for m in METHODS),
            *("{:.3f} +- {:.3f}".format(*PUBLISHED[m][name]) for m in METHODS),
        ]
        for name in summary.index
    ]
    lines = [
        "# Experiment III: the posterior mean, BLoB against LoRA",
        f"{count} dialogues, beam {args.num_beams}, length penalty {args.length_penalty:g}, at most "
        f"{args.max_new_tokens} new tokens; best of each dialogue's references; mean +- std over dialogues. {note}.",
        markdown_table(("metric", "BLoB", "LoRA", "published BLoB", "published LoRA"), rows),
        "BLoB - LoRA on the same dialogues (95 % paired bootstrap interval):",
        "\n".join(
            f"- {METRIC_NAMES[name]}: {comparison}. BLoB is {comparison.verdict}."
            for name, comparison in comparisons.items()
        ),
    ]
    return "\n\n".join(lines) + "\n"
