"""The picture that README opens with, from the runs of a study and of a summarizer.

python -m blob_hf.experiments picture --study runs/study --summaries runs/demo --output docs/figures/overview.png
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blob_hf import cli
from blob_hf.data import demo
from blob_hf.data.summarization import group_dialogues, load_summaries
from blob_hf.experiments.study_report import pooled_reliability
from blob_hf.metrics.agreement import closest_call, word_agreement
from blob_hf.reporting.overview import plot_overview
from blob_hf.utils.errors import BlobError


@dataclass
class PictureArguments:
    """Where the runs are."""

    study: str = field(default="runs/study", metadata={"help": "Folder of `experiments study`."})
    summaries: str = field(default="runs/demo", metadata={"help": "Folder of a run of run_summarization_blob.py."})
    test_file: str | None = field(default=None, metadata={"help": "Its test dialogues. Default: those of the demo."})
    dialogue: str | None = field(
        default=None, metadata={"help": "Id of the dialogue to show. Default: the closest call among them."}
    )
    output: str = field(default="docs/figures/overview.png", metadata={"help": "PNG to write."})


def main(argv: Sequence[str]) -> None:
    """Draw it."""
    (args,) = cli.parse_arguments((PictureArguments,), {}, __doc__ or "", argv)
    panels = pooled_reliability(Path(args.study), overfits=True, methods=("lora", "blob"))
    if len(panels) < 2:
        raise BlobError(f"{args.study} has no complete runs of lora and blob; run `experiments study` first")
    path = Path(args.summaries) / "generated_predictions.jsonl"
    if not path.is_file():
        raise BlobError(f"{path} does not exist; run run_summarization_blob.py first")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = _dialogues(args.test_file)
    row = _choose(rows, texts, args.dialogue)
    words, shares = word_agreement(row["mean_summary"], row["samples"])
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    names = {"lora": "LoRA", "blob": "BLoB"}
    title = "Where LoRA overfits"
    shown = {names[name]: bins for name, bins in panels.items()}
    plot_overview(shown, title, texts[row["id"]], words, shares, args.output)
    print(f"{args.output}: {args.study}, dialogue {row['id']} of {args.summaries}")


def _dialogues(test_file: str | None) -> dict[str, str]:
    file = test_file or str(demo.SUMMARIZATION_FILES["test"])
    return {one.id: one.text for one in group_dialogues(load_summaries(None, None, {"test": file})["test"], None)}


def _choose(rows: list[dict], texts: dict[str, str], wanted: str | None) -> dict:
    """The dialogue of that id; else the closest call (see `metrics.agreement`)."""
    known = [row for row in rows if row["id"] in texts]
    if wanted is not None:
        found = [row for row in known if row["id"] == wanted]
        if not found:
            raise BlobError(
                f"there is no dialogue {wanted!r}; there are {', '.join(row['id'] for row in known[:5])} ..."
            )
        return found[0]
    index = closest_call([row["mean_summary"] for row in known], [row["samples"] for row in known])
    if index is None:
        raise BlobError("the networks agree on every summary; name a dialogue with --dialogue")
    return known[index]
