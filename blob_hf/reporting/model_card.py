"""README.md of an adapter: its model card on the Hub, with metadata that the Hub's search and leaderboards read."""

import math
from pathlib import Path

import peft
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from blob_hf.baselines import METHODS
from blob_hf.reporting.run_summary import RunSummary
from blob_hf.reporting.tables import STD_COLUMN, results_markdown, settings_markdown
from blob_hf.utils import files
from blob_hf.version import __version__

_USE: dict[str | None, str] = {
    "text-classification": "Classifying texts like those it was trained on, where it matters how sure the answer is.",
    "summarization": "Summarizing texts like those it was trained on, where it matters how far to trust a summary.",
    None: "What its base model is for, on data like that it was trained on.",
}
_LIMITS = "Use it as the base model's own card allows."


def write_model_card(folder: Path, run: RunSummary) -> None:
    """Write README.md: how the adapter was trained, what was measured, how to load it as LoRA and as a posterior."""
    files.write_text(folder / "README.md", str(model_card(run)))


def model_card(run: RunSummary) -> ModelCard:
    """The card, with `model-index` metadata of every finite metric on the adapter that is saved."""
    method = METHODS[run.method]
    base = Path(run.base_model).name if _is_local(run) else run.base_model
    body = [
        f"---\n{_metadata(run).to_yaml()}\n---",
        f"# {method.title} of {base}" + (f" on {run.data.name}" if run.data else ""),
        method.about,
        *(["## Results"] if run.results else []),
        *(f"**{results.title}**\n\n{results_markdown(results.table)}" for results in run.results),
        "## Intended use and limits\n\n" + f"{_USE.get(run.task, _USE[None])} {method.limits} {_LIMITS}",
        "## How to use\n\n" + _usage(run),
        "## Training\n\n" + settings_markdown(run.settings),
        *(["\n".join(f"- {note}" for note in run.kl_notes)] if run.kl_notes else []),
        *([_all_arguments(run)] if run.arguments else []),
        f"## Citation\n\n```bibtex\n{method.citation}\n```",
        f"Made with blob_hf {__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"torch {torch.__version__}.",
    ]
    return ModelCard("\n\n".join(body) + "\n")


def _is_local(run: RunSummary) -> bool:
    return Path(run.base_model).exists()


def _metadata(run: RunSummary) -> ModelCardData:
    results = _eval_results(run)
    return ModelCardData(
        library_name="peft",
        base_model=None if _is_local(run) or not run.base_model else run.base_model,
        license=run.license,
        datasets=[run.data.hub_id] if run.data and run.data.hub_id else None,
        pipeline_tag=run.task,
        tags=["lora", "peft", *METHODS[run.method].tags],
        model_name=Path(run.repo).name if results else None,
        eval_results=results or None,
    )


def _eval_results(run: RunSummary) -> list[EvalResult]:
    if run.data is None:
        return []
    rows = [
        (results, metric, column, value)
        for results in run.results
        if results.in_index
        for column in results.table.columns
        if column != STD_COLUMN
        for metric, value in results.table[column].items()
        if value is not None and math.isfinite(value)
    ]
    return [
        EvalResult(
            task_type=run.task or "other",
            dataset_type=run.data.hub_id or run.data.name,
            dataset_name=run.data.name,
            dataset_config=run.data.config,
            dataset_split=results.split,
            metric_type=str(metric),
            metric_name=f"{metric}, {column}",
            metric_value=float(value),
        )
        for results, metric, column, value in rows
    ]


def _usage(run: RunSummary) -> str:
    call = f'model = {run.auto_class}.from_pretrained("{run.repo}"{run.auto_arguments})'
    plain = f"```python\nfrom peft import {run.auto_class}\n\n{call}\n```"
    if not METHODS[run.method].sampled:
        return plain
    n = run.num_samples
    if run.task == "summarization":
        sampled = (
            f"    tokens = model.generate(**{{name: x.repeat({n}, 1) for name, x in inputs.items()}}, "
            "max_new_tokens=128)\n"
            f"summaries = tokenizer.batch_decode(tokens, skip_special_tokens=True)  # {n} per input, sample by sample\n"
        )
    else:
        sampled = (
            f"    logits = model(**{{name: x.repeat({n}, 1) for name, x in inputs.items()}}).logits\n"
            f"probs = logits.softmax(-1).unflatten(0, ({n}, -1)).mean(0)\n"
        )
    return (
        "With its uncertainty (`pip install blob_hf`), inputs repeated once per sample:\n\n```python\n"
        "from blob_hf import BlobModel\nfrom transformers import AutoTokenizer\n\n"
        f'model = BlobModel.from_pretrained("{run.repo}")\ntokenizer = AutoTokenizer.from_pretrained("{run.repo}")\n'
        'inputs = tokenizer(["..."], return_tensors="pt", padding=True)\n'
        f"with model.posterior_samples({n}, seed=0):\n{sampled}```\n\n"
        f"As plain LoRA (N=0), with PEFT alone:\n\n{plain}"
    )


def _all_arguments(run: RunSummary) -> str:
    table = settings_markdown(run.arguments)
    return f"<details><summary>All training arguments that define the run</summary>\n\n{table}\n\n</details>"
