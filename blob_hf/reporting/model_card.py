"""README.md of an adapter (its model card) and report.md of a run, written from what the run did."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData

from blob_hf.reporting.tables import to_markdown
from blob_hf.version import __version__

_CITATION = """@inproceedings{wang2024blob,
  title = {BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large Language Models},
  author = {Wang, Yibin and Shi, Haizhou and Han, Ligong and Metaxas, Dimitris and Wang, Hao},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2024}
}"""

_LIMITS = """The uncertainty covers the LoRA A matrices only; the base model and B are points. Calibration was
measured on the data named above and can be worse elsewhere. Use it as the base model's own card allows."""


@dataclass
class RunSummary:
    """What a card and a report say about a run.

    Attributes:
        settings: Hyperparameters by name.
        tables: Result tables by title (see `results_table`).
        kl_notes: The KL diagnosis, its warnings after it.
        plots: Paths relative to the run folder.
    """

    base_model: str
    dataset: str
    method: str
    settings: Mapping[str, Any]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    kl_notes: list[str] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    license: str | None = None


def write_model_card(folder: Path, run: RunSummary, auto_class: str, arguments: str = "") -> None:
    """Write README.md: how the adapter was trained, what was measured, how to load it as LoRA and as a posterior.

    Args:
        auto_class: The AutoPeftModel-like class of plain PEFT that loads it, for the usage example.
        arguments: What that class needs besides the path, for example ", num_labels=3".
    """
    local = Path(run.base_model).exists()
    data = ModelCardData(
        library_name="peft",
        base_model=None if local else run.base_model,
        license=run.license,
        datasets=None if "/" not in run.dataset or Path(run.dataset).exists() else [run.dataset],
        tags=["lora", "peft"] + (["blob", "bayesian", "uncertainty"] if run.method == "blob" else []),
    )
    title = "BLoB adapter" if run.method == "blob" else "LoRA adapter"
    body = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title} of {Path(run.base_model).name if local else run.base_model} on {run.dataset}",
        _describe(run),
        "## Results",
        *(f"**{name}**\n\n{to_markdown(table)}" for name, table in run.tables.items()),
        "## How to use\n\n" + _usage(run.method, auto_class, arguments),
        "## Training\n\n" + _settings_table(run.settings),
        *(["\n".join(f"- {note}" for note in run.kl_notes)] if run.kl_notes else []),
        f"## Limits\n\n{_LIMITS}",
        f"## Citation\n\n```bibtex\n{_CITATION}\n```\n\nTrained with blob_hf {__version__}.",
    ]
    ModelCard("\n\n".join(body) + "\n").save(folder / "README.md")


def write_report(folder: Path, run: RunSummary) -> None:
    """Write report.md: results, KL diagnosis, plots and settings of one run."""
    body = [
        f"# {run.method} on {run.dataset}",
        f"Base model: `{run.base_model}`.",
        *(f"## {name}\n\n{to_markdown(table)}" for name, table in run.tables.items()),
        *(["## KL\n\n" + "\n".join(f"- {note}" for note in run.kl_notes)] if run.kl_notes else []),
        *(f"![{Path(plot).stem}]({plot})" for plot in run.plots),
        "## Settings\n\n" + _settings_table(run.settings),
    ]
    (folder / "report.md").write_text("\n\n".join(body) + "\n", encoding="utf-8")


def _describe(run: RunSummary) -> str:
    if run.method != "blob":
        return "Plain LoRA (maximum likelihood), trained with blob_hf for comparison with BLoB."
    return (
        "LoRA whose A matrices are Gaussian posteriors (BLoB). `adapter_model.safetensors` is the posterior mean, an "
        "ordinary LoRA adapter; `posterior_std.safetensors` holds the standard deviation of every entry of A. N=0 is "
        "the posterior mean; N=S averages the probabilities of S posterior samples."
    )


def _usage(method: str, auto_class: str, arguments: str) -> str:
    call = f"model = {auto_class}.from_pretrained(PATH_OR_REPO{arguments})"
    plain = f"```python\nfrom peft import {auto_class}\n\n{call}\n```"
    if method != "blob":
        return plain
    return (
        "As a posterior (`pip install blob_hf`), inputs repeated once per sample:\n\n```python\n"
        "from blob_hf import BlobModel\n\nmodel = BlobModel.from_pretrained(PATH_OR_REPO)\n"
        "with model.posterior_samples(10, seed=0):\n"
        "    logits = model(**{name: x.repeat(10, 1) for name, x in inputs.items()}).logits\n"
        "probs = logits.softmax(-1).unflatten(0, (10, -1)).mean(0)\n```\n\n"
        f"As plain LoRA (the posterior mean), with PEFT alone:\n\n{plain}"
    )


def _settings_table(settings: Mapping[str, Any]) -> str:
    return "\n".join(["| setting | value |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in settings.items())])
