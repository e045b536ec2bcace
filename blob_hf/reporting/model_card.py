"""README.md of an adapter: its model card on the Hub, with metadata that the Hub's search and leaderboards read."""

import math
from pathlib import Path

import jinja2
import peft
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from blob_hf.reporting.run_summary import RunSummary
from blob_hf.reporting.tables import STD_COLUMN, markdown_table, results_markdown, settings_markdown
from blob_hf.utils import files
from blob_hf.version import __version__

_USE: dict[str | None, str] = {
    "text-classification": "Classifying texts like those it was trained on, where it matters how sure the answer is.",
    "summarization": "Summarizing texts like those it was trained on, where it matters how far to trust a summary.",
    "multiple-choice": "Answering questions like those it was trained on, where it matters how sure the answer is.",
    None: "What its base model is for, on data like that it was trained on.",
}


def write_model_card(folder: Path, run: RunSummary) -> None:
    """Write README.md: how the adapter was trained, what was measured, how to load it as LoRA and as a posterior."""
    files.write_text(folder / "README.md", str(model_card(run)))


def model_card(run: RunSummary) -> ModelCard:
    """The card, with `model-index` metadata of every finite metric on the adapter that is saved."""
    # jinja2 itself and not ModelCard.from_template, whose environment has no trim_blocks: every tag would leave a line
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("blob_hf.reporting", ""),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters |= {"results_markdown": results_markdown, "settings_markdown": settings_markdown}
    environment.filters["figures_markdown"] = lambda figures: markdown_table(("figure", "value"), figures.items())
    libraries = {"blob_hf": __version__, "transformers": transformers.__version__, "peft": peft.__version__}
    libraries["torch"] = torch.__version__
    text = environment.get_template("model_card.md.jinja").render(
        run=run,
        card=run.card,
        card_data=_metadata(run).to_yaml(),
        base=Path(run.base_model).name if _is_local(run) else run.base_model,
        use=_USE.get(run.task, _USE[None]),
        versions=", ".join(f"{name} {version}" for name, version in libraries.items()),
    )
    return ModelCard(text)


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
        tags=["lora", "peft", *run.card.tags],
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
