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


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """Cells as a GitHub Markdown table, each as `str` writes it.

    Args:
        head: Names of the columns.
        rows: As many cells each.
        align: "l" or "r" for each column; default all "l".
    """
    rules = [{"l": "---", "r": "---:"}[letter] for letter in align or "l" * len(head)]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, rules, *rows))


def results_markdown(table: pd.DataFrame) -> str:
    """A `results_table` as GitHub Markdown; counts (columns of whole numbers) as they are."""
    counts = {column for column in table.columns if pd.api.types.is_integer_dtype(table[column])}
    columns = [
        [str(value) if column in counts else "-" if pd.isna(value) else f"{value:.4f}" for value in table[column]]
        for column in table.columns
    ]
    rows = [[name, *values] for name, *values in zip(table.index, *columns, strict=True)]
    return markdown_table(["", *table.columns], rows, "l" + "r" * len(table.columns))


def settings_markdown(settings: Mapping[str, Any]) -> str:
    """Settings and their values as GitHub Markdown."""
    return markdown_table(("setting", "value"), settings.items())
