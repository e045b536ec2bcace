"""The report of active learning: curves over labelled rows, their areas, and what these gain over random rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from blob_hf.experiments.statistics import PairedTest, holm, paired_interval, paired_test, spread
from blob_hf.reporting.active_plots import plot_learning
from blob_hf.reporting.tables import markdown_table
from blob_hf.utils import files

# Of eval_results.json; those with mean_ are of the posterior mean (N=0).
METRICS = ("accuracy", "nll", "ece", "mean_accuracy", "mean_nll")
# Label, factor and digits of what is shown; whether more is better.
SHOWN = {"accuracy": ("ACC [%]", 100, 1, True), "nll": ("NLL", 1, 3, False)}
RIVAL = "lora-entropy"
Key = tuple[str, str]  # setting, arm


def write(folder: Path, rows: Sequence[dict[str, Any]], arguments: Sequence[str]) -> None:
    """Write report.md, curves.csv, areas.csv and plots/learning.png of the complete rounds, and print the report.

    Args:
        rows: Of each round setting, arm, seed, method, strategy, round, how many rows are labelled, how many distinct
            texts and classes these have, and the `METRICS`.
        arguments: That every run had.
    """
    if not rows:
        return
    curves = pd.DataFrame(rows)
    areas = areas_of(curves)
    files.write_text(folder / "curves.csv", curves.to_csv(index=False))
    files.write_text(folder / "areas.csv", areas.to_csv(index=False))
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    points = intervals(curves)
    plot_learning(
        points, {metric: (label, factor) for metric, (label, factor, *_) in SHOWN.items()},
        folder / "plots" / "learning.png",
    )  # fmt: skip
    parts = [
        "# What to label next",
        f"{len(curves.drop_duplicates(['setting', 'arm', 'seed']))} sequences of rounds of run_glue_blob.py "
        f"{' '.join(arguments)}".strip(),
        *(
            f"## {label} over labelled rows, mean [95 % t-interval] over seeds\n\n{curves_text(points, metric)}"
            for metric, (label, *_) in SHOWN.items()
        ),
        "## Area under the curve, against random rows for the same method\n\n" + areas_text(areas),
        f"## Area under the curve, against {RIVAL}\n\n" + rival_text(areas),
        "## What was labelled by the last round\n\n" + labelled_text(curves),
        "## Plots\n\n![learning](plots/learning.png)",
    ]
    text = "\n\n".join(parts) + "\n"
    files.write_text(folder / "report.md", text)
    print(text)
    print(f"Everything is in {folder}")


def intervals(curves: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of every arm at every number of labelled rows, with its 95 % t-interval (infinite of one seed).

    Returns:
        Rows of setting, arm, labelled, metric, seeds, value, low, high.
    """
    rows = []
    for (setting, arm, labelled), part in curves.groupby(["setting", "arm", "labelled"], sort=False):
        for metric in SHOWN:
            found = paired_interval(part[metric], np.zeros(len(part)))
            facts = {"setting": setting, "arm": arm, "labelled": labelled, "metric": metric, "seeds": len(part)}
            rows.append({**facts, "value": found.value, "low": found.low, "high": found.high})
    return pd.DataFrame(rows)


def areas_of(curves: pd.DataFrame) -> pd.DataFrame:
    """The area under every curve divided by the width of its numbers of rows, so that it is a mean of the metric.

    By trapezoids, for the sequences that have as many rounds as any of their setting: others would be compared on
    other numbers of rows.
    """
    rows = []
    complete = curves.groupby("setting")["round"].transform("max") + 1
    for (setting, arm, seed), part in curves.groupby(["setting", "arm", "seed"], sort=False):
        ordered = part.sort_values("labelled")
        if len(ordered) == complete[part.index[0]] > 1:
            width = float(ordered["labelled"].iloc[-1] - ordered["labelled"].iloc[0])
            areas = {name: float(np.trapezoid(ordered[name], ordered["labelled"])) / width for name in METRICS}
            rows.append({"setting": setting, "arm": arm, "seed": seed, **areas})
    return pd.DataFrame(rows, columns=["setting", "arm", "seed", *METRICS])


def curves_text(points: pd.DataFrame, metric: str) -> str:
    """A table for each setting: arms, and the metric at each number of labelled rows."""
    label, factor, digits, _ = SHOWN[metric]
    tables = []
    for setting, part in points[points["metric"] == metric].groupby("setting", sort=False):
        sizes = sorted(set(part["labelled"]))
        rows = []
        for arm, own in part.groupby("arm", sort=False):
            found = zip(own["labelled"], own["value"], own["low"], own["high"], strict=True)
            cells = {size: _shown(value, low, high, factor, digits) for size, value, low, high in found}
            rows.append([arm, own["seeds"].max(), *(cells.get(size, "-") for size in sizes)])
        tables.append(markdown_table((f"{setting}, {label}", "seeds", *map(str, sizes)), rows))
    return "\n\n".join(tables)


def _shown(value: float, low: float, high: float, factor: float, digits: int, sign: str = "") -> str:
    """A value with its interval, without one where that is infinite."""
    text = f"{factor * value:{sign}.{digits}f}"
    ends = ", ".join(f"{factor * end:{sign}.{digits}f}" for end in (low, high))
    return f"{text} [{ends}]" if np.isfinite(low) else text


def areas_text(areas: pd.DataFrame) -> str:
    """Areas of all arms, and their paired differences from random rows for the same method."""
    tests = {metric: _tests(areas, metric, lambda arm: f"{arm.rpartition('-')[0]}-random") for metric in SHOWN}
    rows = []
    for setting, arm in _keys(areas):
        part = areas[(areas["setting"] == setting) & (areas["arm"] == arm)]
        cells = []
        for metric, (_, factor, digits, _) in SHOWN.items():
            cells += [spread(part[metric]).show(factor, digits), _difference(tests[metric], (setting, arm), metric)]
        rows.append([setting, arm, len(part), *cells])
    if not rows:
        return "No sequence has all its rounds yet."
    head = [text for label, *_ in SHOWN.values() for text in (label, "- random")]
    note = (
        "The mean of the metric between the first and the last number of labelled rows, +- std over seeds. Differences "
        "are on the same seeds, with their 95 % t-interval; **better** or **worse** where the paired t-test's p < 0.05 "
        "after Holm's correction over all differences of a column."
    )
    return f"{note}\n\n{markdown_table(('setting', 'arm', 'seeds', *head), rows)}"


def rival_text(areas: pd.DataFrame) -> str:
    """Paired differences of all other arms from plain LoRA that labels what it is least sure of."""
    tests = {metric: _tests(areas, metric, lambda _: RIVAL) for metric in SHOWN}
    keys = list(dict.fromkeys((setting, arm) for found in tests.values() for setting, arm in found))
    if not keys:
        return f"There is no {RIVAL} to compare with on two seeds or more."
    rows = [[*key, *(_difference(tests[metric], key, metric) for metric in SHOWN)] for key in keys]
    return markdown_table(("setting", "arm", *(label for label, *_ in SHOWN.values())), rows)


def labelled_text(curves: pd.DataFrame) -> str:
    """How many rows, distinct texts and classes the arms have labelled in all, means over seeds."""
    last = curves[curves["round"] == curves.groupby("setting")["round"].transform("max")]
    rows = []
    for setting, arm in _keys(last):
        part = last[(last["setting"] == setting) & (last["arm"] == arm)]
        rows.append([setting, arm, *(f"{part[name].mean():.1f}" for name in ("labelled", "distinct", "classes"))])
    return markdown_table(("setting", "arm", "rows", "distinct texts", "classes"), rows)


def _keys(areas: pd.DataFrame) -> list[Key]:
    return list(dict.fromkeys(zip(map(str, areas["setting"]), map(str, areas["arm"]), strict=True)))


def _tests(areas: pd.DataFrame, metric: str, other: Callable[[str], str]) -> dict[Key, tuple[PairedTest, float]]:
    """Of every arm that has a partner on two seeds or more: the paired test, and p after Holm's correction."""
    found: dict[Key, PairedTest] = {}
    for setting, arm in _keys(areas):
        own, partner = (
            areas[(areas["setting"] == setting) & (areas["arm"] == name)].set_index("seed")[metric]
            for name in (arm, other(arm))
        )
        seeds = own.index.intersection(partner.index)
        if arm != other(arm) and len(seeds) > 1:
            found[setting, arm] = paired_test(own.loc[seeds], partner.loc[seeds])
    corrected = holm([test.p_value for test in found.values()])
    return {key: (test, p) for (key, test), p in zip(found.items(), corrected, strict=True)}


def _difference(tests: dict[Key, tuple[PairedTest, float]], key: Key, metric: str) -> str:
    if key not in tests:
        return "-"
    (test, p_value), (_, factor, digits, more) = tests[key], SHOWN[metric]
    word = ""
    if p_value < 0.05:
        word = " **better**" if (test.interval.value > 0) == more else " **worse**"
    return _shown(test.interval.value, test.interval.low, test.interval.high, factor, digits, "+") + word
