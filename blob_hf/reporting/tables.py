"""The table at the end of a run: posterior mean (N=0) beside N posterior samples."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from blob_hf.utils.names import CHOICES, MEAN, STD

STD_COLUMN = "std over samples"


def results_table(metrics: dict[str, float], prefix: str, names: list[str], num_samples: int) -> pd.DataFrame:
    """Metrics as rows; columns N=0, N=S and the std over samples of each sample's own value.

    Args:
        metrics: With keys `{prefix}_{name}`, `{prefix}_mean_{name}`, `{prefix}_{name}_sample_std`.
        prefix: "eval" or "predict".
        names: Metrics to show, in order.
        num_samples: S; 0 leaves the posterior mean's column alone (as for plain LoRA).
    """
    columns = {"N=0 (posterior mean)": [metrics.get(f"{prefix}_{MEAN}{name}") for name in names]}
    if num_samples:
        columns[f"N={num_samples} (samples)"] = [metrics.get(f"{prefix}_{name}") for name in names]
        columns[STD_COLUMN] = [metrics.get(f"{prefix}_{name}{STD}") for name in names]
        for choice in CHOICES:
            values = [metrics.get(f"{prefix}_{choice}_{name}") for name in names]
            if any(value is not None for value in values):
                columns[choice] = values
    return pd.DataFrame(columns, index=names)


def to_text(table: pd.DataFrame, title: str) -> str:
    """The table as aligned text for a terminal."""
    return f"\n{title}\n{table.to_string(float_format='{:.4f}'.format, na_rep='-')}\n"


def to_markdown(table: pd.DataFrame) -> str:
    """The table as GitHub Markdown."""

    def row(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = [row(["", *table.columns]), row(["---", *["---:"] * len(table.columns)])]
    for name, values in zip(table.index, table.to_numpy(), strict=True):
        lines.append(row([str(name), *("-" if pd.isna(value) else f"{value:.4f}" for value in values)]))
    return "\n".join(lines)


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells that are text already, as a GitHub Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def settings_table(settings: Mapping[str, Any]) -> str:
    """Settings and their values as a GitHub Markdown table."""
    return "\n".join(["| setting | value |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in settings.items())])
