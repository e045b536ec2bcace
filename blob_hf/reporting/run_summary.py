"""What a model card and a report say about a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class DataSource:
    """The data of a run: its name, and where it is on the Hub if it is there."""

    name: str
    hub_id: str | None = None
    config: str | None = None


@dataclass(frozen=True)
class Results:
    """A table of metrics (see `results_table`) on one split.

    Attributes:
        in_index: Whether it goes into the card's model-index: it describes the adapter that is saved (and not the model
            before training) on the data of the run (and not out of distribution).
    """

    title: str
    split: str
    table: pd.DataFrame
    in_index: bool = True


@dataclass(frozen=True)
class MethodCard:
    """What a model card says of a method.

    Attributes:
        title: What its adapters are called, for example "BLoB adapter".
        about: How it works and what its files hold.
        limits: What its uncertainty does not cover.
        citation: BibTeX.
        tags: Beside "lora" and "peft", for the Hub's search.
        sampled: Whether it has networks to draw: the card then shows how.
    """

    title: str
    about: str
    limits: str
    citation: str
    tags: tuple[str, ...] = ()
    sampled: bool = False


@dataclass
class RunSummary:
    """A run, or an adapter of which no run is known (then `data` is None).

    Attributes:
        base_model: Hub id or folder.
        method: Its name, as in `--method`.
        card: What the model card says of the method.
        settings: The main hyperparameters by name.
        arguments: All training arguments that define the run, by name.
        kl_notes: The KL diagnosis before training, its warnings, the verdict after it.
        kl_figures: The figures of the verdict, in words, by what they are.
        sentence: What the run came to, in plain words.
        plots: Paths relative to the run folder.
        notes: Further findings, a line each, for the report.
        sections: Further sections of the report, as Markdown with their headings.
        examples: Inputs and what was predicted for them, some lines each, for the report.
        repo: Hub repo or folder of the adapter, for the examples.
        task: Its tag on the Hub, for example "text-classification".
        num_samples: Networks that the examples draw.
        auto_class: The class with which plain PEFT loads the adapter.
        auto_arguments: What that class needs besides the path, for example ", num_labels=3".
    """

    base_model: str
    data: DataSource | None
    method: str
    card: MethodCard
    settings: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    results: list[Results] = field(default_factory=list)
    kl_notes: list[str] = field(default_factory=list)
    kl_figures: Mapping[str, str] = field(default_factory=dict)
    sentence: str = ""
    plots: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    license: str | None = None
    repo: str = "PATH_OR_REPO"
    task: str | None = None
    num_samples: int = 10
    auto_class: str = "AutoPeftModel"
    auto_arguments: str = ""
