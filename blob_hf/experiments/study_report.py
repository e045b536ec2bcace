"""The report of the study: one row a run, paired differences with Holm's correction, mean ranks, plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from blob_hf.baselines.temperature import scale
from blob_hf.cli.costs import COSTS_FILE
from blob_hf.experiments.statistics import Ranks, holm, mean_ranks, paired_test, spread
from blob_hf.experiments.study_settings import SETTINGS
from blob_hf.metrics.calibration import ReliabilityBins, calibration_metrics, reliability_bins
from blob_hf.metrics.detection import detection_metrics
from blob_hf.metrics.uncertainty import predictive_entropy
from blob_hf.reporting.classification_plots import plot_reliability
from blob_hf.reporting.study_plots import plot_curves, plot_ranks
from blob_hf.reporting.tables import markdown_table
from blob_hf.utils import files

Key = tuple[str, str, int]  # setting, method, seed
TEMPERATURE = " + T"

# Label, factor and digits of each metric; whether more is better.
SHOWN = {
    "accuracy": ("ACC [%]", 100, 1, True),
    "ece": ("ECE [%]", 100, 1, False),
    "nll": ("NLL", 1, 3, False),
    "brier": ("Brier", 1, 3, False),
    "error_auroc": ("AUROC of errors", 1, 3, True),
    "ood_auroc": ("AUROC out of scope", 1, 3, True),
    "ood_fpr95": ("FPR95 out of scope", 1, 3, False),
}
TESTED = ("accuracy", "ece", "nll", "ood_auroc")
BASE, CURED, OURS = "lora", f"lora_early_stopping{TEMPERATURE}", "blob"
MEAN = f"blob, N=0{TEMPERATURE}"  # the posterior mean with the same cheap cure
RANKED = (f"lora{TEMPERATURE}", CURED, "blob, N=0", MEAN)  # beside each method as it is
SINGLE = ("lora", "lora_early_stopping", "map")  # of one network: their N=0 is all that there is


def write(
    folder: Path, runs: Mapping[Key, Path], curves: Mapping[Key, Path], strengths: Mapping[tuple[str, str], float],
    arguments: Sequence[str], known: pd.DataFrame | None = None,
) -> None:  # fmt: skip
    """Write report.md, results.csv, curves.csv and the plots of the complete runs, and print the report.

    Args:
        known: Rows of the results.csv of a study elsewhere.
    """
    if not runs and known is None:
        return
    results = pd.DataFrame([row for key, path in runs.items() for row in read_run(key, path)])
    if runs:
        pairs = zip(results["setting"], results["method"], strict=True)
        results["strength"] = [strengths.get(pair, float("nan")) for pair in pairs]
    if known is not None:
        results = _in_order(pd.concat([known, results], ignore_index=True))
    files.write_text(folder / "results.csv", results.to_csv(index=False))
    index = [[*key, path.relative_to(folder)] for key, path in runs.items()]
    table = pd.DataFrame(index, columns=["setting", "method", "seed", "folder"])
    files.write_text(folder / "runs.csv", table.to_csv(index=False))
    watched = pd.DataFrame([row for key, path in curves.items() for row in read_curve(key, path)])
    files.write_text(folder / "curves.csv", watched.to_csv(index=False))
    plots = draw(folder, runs, results, watched)
    parts = [
        "# Where the posterior pays",
        f"{len(runs)} runs of run_glue_blob.py {' '.join(arguments)}"
        + ("" if known is None else f", and {len(known)} rows of results of runs elsewhere"),
        "## The settings\n\n" + settings_text(results, watched),
        "## Results, mean +- std over seeds\n\n" + results_text(results),
        "## BLoB against LoRA, on the same seeds\n\n" + comparisons_text(results, BASE),
        "## BLoB against LoRA with early stopping and a temperature\n\n" + comparisons_text(results, CURED),
        "## Its mean with a temperature against the same\n\n" + comparisons_text(results, CURED, MEAN),
        "## Over all settings\n\n" + overall_text(results),
        "## Mean ranks\n\n" + ranks_text(results),
        "## Strengths that were chosen, and costs\n\n" + costs_text(results, strengths),
        "## Plots\n\n" + "\n\n".join(f"![{Path(plot).stem}]({plot})" for plot in plots),
    ]
    text = "\n\n".join(parts) + "\n"
    files.write_text(folder / "report.md", text)
    print(text)
    print(f"Everything is in {folder}")


def _in_order(results: pd.DataFrame) -> pd.DataFrame:
    """Rows by setting, method and seed, settings and methods as they are listed."""
    methods = list(dict.fromkeys(results["method"]))
    place = results.assign(
        setting=results["setting"].map(list(SETTINGS).index), method=results["method"].map(methods.index)
    )
    return results.loc[place.sort_values(["setting", "method", "seed"], kind="stable").index].reset_index(drop=True)


# ----- reading the runs -------------------------------------------------------------------------------------------


def read_run(key: Key, folder: Path) -> list[dict[str, Any]]:
    """Rows of a run: its predictive and its mean (N=0), each also with its temperature, and BLoB before its scale."""
    setting, method, seed = key
    temperatures = _json(folder / "temperature.json")
    costs = _json(folder / COSTS_FILE)
    labels, log_probs, mean = _predictions(folder / "validation_predictions.jsonl")
    outside: Any = {"log_probs": None, "mean": None}
    if (folder / "ood_oos_predictions.jsonl").is_file():
        _, outside["log_probs"], outside["mean"] = _predictions(folder / "ood_oos_predictions.jsonl")
    kinds = [("", log_probs, outside["log_probs"], temperatures["predictive"])]
    if method not in SINGLE:
        kinds.append((", N=0", mean, outside["mean"], temperatures["mean"]))
    rows = []
    for suffix, inside, other, temperature in kinds:
        rows.append((method + suffix, measures(inside, labels, other)))
        scaled = None if other is None else scale(other, temperature)
        rows.append((method + suffix + TEMPERATURE, measures(scale(inside, temperature), labels, scaled)))
    if (folder / "unscaled_validation_predictions.jsonl").is_file():
        _, before, _ = _predictions(folder / "unscaled_validation_predictions.jsonl")
        rows.append((method + ", unscaled", measures(before, labels, None)))
    facts = {
        "train_seconds": costs.get("train_runtime", 0.0) + costs.get("fit_runtime", 0.0),
        "networks": costs.get("networks", 0),
    }
    return [{"setting": setting, "method": name, "seed": seed, **found, **facts} for name, found in rows]


def measures(log_probs: np.ndarray, labels: np.ndarray, outside: np.ndarray | None) -> dict[str, float]:
    """The metrics of `SHOWN`; errors and out-of-scope inputs are told by the entropy."""
    found = calibration_metrics(log_probs, labels)
    wrong = log_probs.argmax(axis=1) != labels
    entropy = predictive_entropy(log_probs[:, None])
    both = wrong.any() and not wrong.all()
    found["error_auroc"] = detection_metrics(entropy[~wrong], entropy[wrong])["auroc"] if both else float("nan")
    detected = detection_metrics(entropy, predictive_entropy(outside[:, None])) if outside is not None else {}
    return {
        **{name: found[name] for name in ("accuracy", "ece", "nll", "brier", "error_auroc")},
        "ood_auroc": detected.get("auroc", float("nan")),
        "ood_fpr95": detected.get("fpr95", float("nan")),
    }


def read_curve(key: Key, folder: Path) -> list[dict[str, Any]]:
    """Metrics of the test rows while a run trained."""
    setting, method, seed = key
    rows = []
    for entry in _json(folder / "trainer_state.json")["log_history"]:
        if "eval_nll" in entry:
            kinds = {"": "eval_"} if method in SINGLE else {", N=0": "eval_mean_", "": "eval_"}
            for suffix, prefix in kinds.items():
                values = {name: entry[f"{prefix}{name}"] for name in ("nll", "ece", "accuracy")}
                rows.append(
                    {"setting": setting, "method": method + suffix, "seed": seed, "step": entry["step"], **values}
                )
    return rows


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _predictions(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (0 where there are none), log-probabilities of the predictive and of the mean."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    labels = np.array([row.get("label", 0) for row in rows])
    return labels, np.array([row["log_probs"] for row in rows]), np.array([row["mean_log_probs"] for row in rows])


# ----- text -------------------------------------------------------------------------------------------------------


def settings_text(results: pd.DataFrame, curves: pd.DataFrame) -> str:
    """The settings, and whether LoRA's test NLL rose while it trained."""
    rows = []
    for name in dict.fromkeys(results["setting"]):
        setting = SETTINGS[name]
        shown = "-"
        part = curves[(curves["setting"] == name) & (curves["method"] == BASE)] if len(curves) else curves
        if len(part):
            by_step = part.groupby("step")["nll"].mean()
            shown = f"{by_step.min():.2f} at step {by_step.idxmin()} -> {by_step.iloc[-1]:.2f}"
        group = "overfits" if setting.overfits else "does not"
        rows.append(
            [
                name,
                setting.rows,
                setting.held_out,
                setting.steps,
                f"{setting.passes:.0f}",
                f"{setting.learning_rate:g}",
                shown,
                group,
            ]
        )
    head = ("setting", "rows", "held out", "steps", "passes", "learning rate", "LoRA's test NLL: least -> last", "LoRA")
    return markdown_table(head, rows)


def results_text(results: pd.DataFrame) -> str:
    """Every method in every setting."""
    rows = []
    for (setting, method), part in results.groupby(["setting", "method"], sort=False):
        cells = [
            spread(part[name]).show(factor, digits) if part[name].notna().all() else "-"
            for name, (_, factor, digits, _) in SHOWN.items()
        ]
        rows.append([setting, method, len(part), *cells])
    return markdown_table(("setting", "method", "seeds", *(label for label, *_ in SHOWN.values())), rows)


def comparisons_text(results: pd.DataFrame, other: str, ours: str = OURS) -> str:
    """Paired differences in each setting, Holm-corrected over the settings of a metric."""
    settings = list(dict.fromkeys(results["setting"]))
    cells: dict[str, list[str]] = {name: [name] for name in settings}
    for metric in TESTED:
        _, factor, digits, more = SHOWN[metric]
        found = {}
        for name in settings:
            first, second = _paired(results, name, ours, other, metric)
            if len(first) > 1:
                found[name] = paired_test(first, second)
        corrected = dict(zip(found, holm([test.p_value for test in found.values()]), strict=True))
        for name in settings:
            if name not in found:
                cells[name].append("-")
                continue
            interval = found[name].interval
            word = ""
            if corrected[name] < 0.05:
                word = " **better**" if (interval.value > 0) == more else " **worse**"
            low, high = (f"{factor * end:+.{digits}f}" for end in (interval.low, interval.high))
            cells[name].append(f"{factor * interval.value:+.{digits}f} [{low}, {high}]{word}")
    head = ("setting", *(SHOWN[metric][0] for metric in TESTED))
    shown = f"`{ours}` (N=10, scale fitted)" if ours == OURS else f"`{ours}`"
    note = (
        f"{shown} minus `{other}`: mean over seeds with its 95 % t-interval; **better** or "
        "**worse** where the paired t-test's p < 0.05 after Holm's correction over the settings."
    )
    return f"{note}\n\n{markdown_table(head, list(cells.values()))}"


def _paired(results: pd.DataFrame, setting: str, first: str, second: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of two methods on the seeds that both have."""
    part = results[(results["setting"] == setting) & results[metric].notna()]
    one, two = (part[part["method"] == name].set_index("seed")[metric] for name in (first, second))
    seeds = one.index.intersection(two.index)
    return one.loc[seeds].to_numpy(), two.loc[seeds].to_numpy()


def overall_text(results: pd.DataFrame) -> str:
    """Each method relative to LoRA, averaged over the settings of a group."""
    rows = []
    for overfits, title in ((True, "where LoRA overfits"), (False, "where it does not")):
        names = [name for name in dict.fromkeys(results["setting"]) if SETTINGS[name].overfits == overfits]
        for method in dict.fromkeys(results["method"]) if names else ():
            cells = []
            for metric, relative in (("accuracy", False), ("ece", True), ("nll", True), ("ood_auroc", False)):
                means = [
                    (one.mean(), two.mean())
                    for one, two in (_paired(results, name, method, BASE, metric) for name in names)
                    if len(one)
                ]
                if not means:
                    cells.append("-")
                elif relative:
                    cells.append(f"{100 * np.mean([own / base - 1 for own, base in means]):+.0f} %")
                else:
                    factor, digits = SHOWN[metric][1:3]
                    cells.append(f"{factor * np.mean([own - base for own, base in means]):+.{digits}f}")
            rows.append([title, method, *cells])
    return markdown_table(("settings", "method", "ACC", "ECE", "NLL", "AUROC out of scope"), rows) + (
        "\n\nDifferences from `lora` (ACC in points), relative ones for ECE and NLL: means over the settings."
    )


def ranked(results: pd.DataFrame, metric: str) -> Ranks | None:
    """Mean ranks over the settings of the methods that every setting has; None for fewer than two settings.

    In each setting the means of the seeds that all its methods have: a seed that one of them lacks would favour some.
    """
    shown = [name for name in dict.fromkeys(results["method"]) if name in RANKED or not set(name) & set(",+")]
    rows = results[results["method"].isin(shown) & results[metric].notna()]
    methods = rows.groupby("setting")["method"].transform("nunique")
    rows = rows[rows.groupby(["setting", "seed"])["method"].transform("nunique") == methods]
    table = rows.pivot_table(index="setting", columns="method", values=metric)
    table = table.dropna(axis="index", how="all").dropna(axis="columns")
    if len(table) < 2 or table.shape[1] < 2:
        return None
    return mean_ranks(table, more_is_better=SHOWN[metric][3])


def ranks_text(results: pd.DataFrame) -> str:
    """Mean ranks with their critical difference."""
    columns = {metric: ranked(results, metric) for metric in TESTED}
    columns = {metric: found for metric, found in columns.items() if found is not None}
    if not columns:
        return "Fewer than two settings."
    methods = [
        name
        for name in dict.fromkeys(results["method"])
        if any(name in found.ranks for found in columns.values() if found)
    ]
    rows = [
        [name, *(f"{found.ranks[name]:.1f}" if found and name in found.ranks else "-" for found in columns.values())]
        for name in methods
    ]
    last = ["critical difference", *(f"{found.critical_difference:.1f}" for found in columns.values() if found)]
    test = ["Friedman p", *(f"{found.p_value:.2g}" for found in columns.values() if found)]
    head = ("method", *(SHOWN[metric][0] for metric in columns))
    return markdown_table(head, [*rows, last, test]) + (
        "\n\nOne row a method, and of LoRA its cheap cures. 1 is best; ranks of the means over the seeds that all "
        "of them have, averaged over settings (those of one task share test rows). Two methods differ (Nemenyi, 5 %) "
        "where their ranks are further apart than the critical difference (Demsar, 2006)."
    )


def costs_text(results: pd.DataFrame, strengths: Mapping[tuple[str, str], float]) -> str:
    """Training time relative to LoRA, networks in a prediction, and strengths."""
    rows = []
    own = results[~results["method"].str.contains("[,+]")]
    base = own[own["method"] == BASE].set_index(["setting", "seed"])["train_seconds"]
    for method, part in own.groupby("method", sort=False):
        times = part.set_index(["setting", "seed"])["train_seconds"]
        ratio = (times / base.reindex(times.index)).mean()
        chosen = [f"{value:g}" for (_, name), value in strengths.items() if name == method]
        rows.append([method, f"{ratio:.2f}", f"{part['networks'].max():.0f}", ", ".join(chosen) or "-"])
    return markdown_table(("method", "training or fit / LoRA's", "networks", "strength, setting by setting"), rows) + (
        "\n\nTimes of runs that shared the machine, two at a time; laplace and tfb need a trained LoRA besides, and "
        "choosing a strength takes its trainings. Prediction costs as many forwards as there are networks (1 for N=0)."
    )


# ----- plots ------------------------------------------------------------------------------------------------------


def draw(folder: Path, runs: Mapping[Key, Path], results: pd.DataFrame, curves: pd.DataFrame) -> list[str]:
    """The plots, as paths relative to the folder."""
    target = folder / "plots"
    target.mkdir(parents=True, exist_ok=True)
    plots = []
    if len(curves):
        passes = {name: SETTINGS[name].passes / SETTINGS[name].steps for name in dict.fromkeys(curves["setting"])}
        plot_curves(curves, passes, {"nll": "NLL", "ece": "ECE"}, target / "curves.png")
        plots.append("plots/curves.png")
    ranks = {SHOWN[metric][0]: found for metric in TESTED if (found := ranked(results, metric)) is not None}
    if ranks:
        plot_ranks(ranks, target / "ranks.png")
        plots.append("plots/ranks.png")
    for overfits, name in ((True, "overfitting"), (False, "other")):
        panels = _panels(runs, overfits, (BASE, CURED, OURS))
        if len(panels) > 1:
            plot_reliability(panels, target / f"reliability_{name}.png")
            plots.append(f"plots/reliability_{name}.png")
    return plots


def pooled_reliability(folder: Path, overfits: bool, methods: Sequence[str]) -> dict[str, ReliabilityBins]:
    """Reliability of methods where a study's settings do, or do not, overfit, on the seeds that all of them have."""
    path = folder / "runs.csv"
    rows = pd.read_csv(path).to_dict("records") if path.is_file() else []
    runs = {(str(r["setting"]), str(r["method"]), int(r["seed"])): folder / str(r["folder"]) for r in rows}
    return _panels(runs, overfits, methods)


def _panels(runs: Mapping[Key, Path], overfits: bool, methods: Sequence[str]) -> dict[str, ReliabilityBins]:
    """The same of runs; a method of which there is none is left out."""
    names = {method: method.removesuffix(TEMPERATURE) for method in methods}
    names = {method: name for method, name in names.items() if any(name == key[1] for key in runs)}
    group = {(setting, seed) for setting, _, seed in runs if SETTINGS[setting].overfits == overfits}
    shared = sorted(pair for pair in group if all((pair[0], name, pair[1]) in runs for name in names.values()))
    return {
        method: reliability_bins(*_pooled([runs[setting, name, seed] for setting, seed in shared], method != name))
        for method, name in names.items()
        if shared
    }


def _pooled(paths: Sequence[Path], tempered: bool) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of several runs one after another, padded to the most classes, and their labels."""
    found = []
    for path in paths:
        labels, log_probs, _ = _predictions(path / "validation_predictions.jsonl")
        if tempered:
            log_probs = scale(log_probs, _json(path / "temperature.json")["predictive"])
        found.append((log_probs, labels))
    width = max(log_probs.shape[1] for log_probs, _ in found)
    wide = [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-1e4) for p, _ in found]
    return np.concatenate(wide), np.concatenate([labels for _, labels in found])
