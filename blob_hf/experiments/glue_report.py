"""The report of a grid of classifiers: one table beside the published ones, paired comparisons, verdicts, plots."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from blob_hf.cli.artifacts import VERDICT_FILE
from blob_hf.cli.costs import COSTS_FILE
from blob_hf.experiments.published import GLUE, Experiment
from blob_hf.experiments.statistics import Spread, paired_interval, spread
from blob_hf.metrics.calibration import reliability_bins
from blob_hf.metrics.classification import MEAN_CURVE, rejection_curves
from blob_hf.metrics.selective import RiskCoverage
from blob_hf.reporting.classification_plots import plot_rejection, plot_reliability
from blob_hf.reporting.grid_plots import plot_methods
from blob_hf.reporting.kl_plots import plot_trajectories
from blob_hf.reporting.tables import markdown_table
from blob_hf.trainer.kl.history import FILE_NAME
from blob_hf.utils import files
from blob_hf.utils.names import MEAN

Key = tuple[str, str, int]  # task, method, seed
SCALED = " + T"  # behind a method's name: with temperature scaling

# Name, factor and digits of each metric in the tables; and whether more is better.
SHOWN = {
    "accuracy": ("ACC [%]", 100, 2, True),
    "ece": ("ECE [%]", 100, 2, False),
    "nll": ("NLL", 1, 3, False),
    "brier": ("Brier", 1, 3, False),
}
DETECTION = ("mean_entropy_auroc", "entropy_auroc", "mutual_information_auroc", "entropy_aupr", "entropy_fpr95")


def write(folder: Path, runs: Mapping[Key, Path], arguments: Sequence[str], experiment: Experiment = GLUE) -> None:
    """Write report.md, results.csv and the plots of the complete runs, and print the report."""
    if not runs:
        return
    results = read_results(runs)
    files.write_text(folder / "results.csv", results.to_csv(index=False))
    verdicts = _read_verdicts(runs)
    detection = _read_detection(runs)
    plots = draw(folder, runs, results)
    parts = [
        f"# {experiment.title}, mean +- std over seeds",
        f"{len(runs)} runs of {experiment.script}.py {' '.join(arguments)}",
        results_text(results, experiment),
        comparisons_text(results),
        costs_text(runs),
        *([f"## What the KL did\n\n{_text(verdicts)}"] if len(verdicts) else []),
        *([f"## Out of distribution\n\n{_detection_text(detection)}"] if len(detection) else []),
        "## Plots\n\nPooled over the seeds.\n\n" + "\n\n".join(f"![{Path(plot).stem}]({plot})" for plot in plots),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    files.write_text(folder / "report.md", text)
    print(text)
    print(f"Everything is in {folder}")


# ----- reading the runs -------------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_results(runs: Mapping[Key, Path]) -> pd.DataFrame:
    """Rows of task, method, seed, N (posterior samples; 0 is the posterior mean) and the metrics.

    Temperature-scaled predictions are rows of their own, of the method `... + T`.
    """
    rows = []
    for (task, method, seed), folder in runs.items():
        for suffix, file in (("", "eval_results.json"), (SCALED, "eval_temperature_results.json")):
            if suffix and not (folder / file).is_file():
                continue
            found = _json(folder / file)
            samples = int(found["eval_num_samples"])
            for count, prefix in [(0, f"eval_{MEAN}"), *([(samples, "eval_")] if samples else [])]:
                values = {name: found.get(prefix + name) for name in (*SHOWN, "rejection_area")}
                rows.append({"task": task, "method": method + suffix, "seed": seed, "N": count, **values})
    return pd.DataFrame(rows)


def _read_verdicts(runs: Mapping[Key, Path]) -> pd.DataFrame:
    rows = []
    for (task, method, seed), folder in runs.items():
        if (folder / VERDICT_FILE).is_file():
            found = _json(folder / VERDICT_FILE)
            weights, prior = found["num_weights"], found["prior_std"]
            rows.append(
                {
                    "task": task,
                    "method": method,
                    "seed": str(seed),
                    "verdict": found["verdict"],
                    "cycle M": f"{found['cycle_steps']}",
                    "sum of pi_t": f"{found['total_weight']:.2f}",
                    "KL per weight": f"{found['kl_start'] / weights:.2f} -> {found['kl_end'] / weights:.2f}",
                    "std / prior": f"{found['std_start'] / prior:.3f} -> {found['std_end'] / prior:.3f}",
                    "sample gap [%]": "-" if found["sample_gap"] is None else f"{100 * found['sample_gap']:.2f}",
                }
            )
    return pd.DataFrame(rows)


def _read_detection(runs: Mapping[Key, Path]) -> pd.DataFrame:
    rows = []
    for (task, method, seed), folder in runs.items():
        for path in sorted(folder.glob("ood_*_results.json")):
            name = path.name.removesuffix("_results.json")
            found = {key.removeprefix(f"{name}_"): value for key, value in _json(path).items()}
            values = {key: found.get(key, np.nan) for key in DETECTION}
            rows.append({"task": task, "other": name.removeprefix("ood_"), "method": method, "seed": seed, **values})
    return pd.DataFrame(rows)


# ----- text -------------------------------------------------------------------------------------------------------


def _text(table: pd.DataFrame) -> str:
    return markdown_table(list(table.columns), table.astype(str).to_numpy().tolist())


def _label(method: str, count: int) -> str:
    return f"{method}, N={count}"


def results_text(results: pd.DataFrame, experiment: Experiment = GLUE) -> str:
    """One table: each task's methods with N=0 and N=S, then the published rows with our distance from them."""
    rows = []
    for task, part in results.groupby("task", sort=False):
        ours: dict[str, dict[str, Spread]] = {}
        for (method, count), group in part.groupby(["method", "N"], sort=False):
            ours[_label(str(method), int(str(count)))] = {name: spread(group[name]) for name in SHOWN}
        for label, cells in ours.items():
            shown = [cells[name].show(scale, digits) for name, (_, scale, digits, _) in SHOWN.items()]
            rows.append([str(task), label, str(next(iter(cells.values())).count), *shown])
        best = (
            _label("blob", int(part.loc[part["method"] == "blob", "N"].max())) if "blob" in set(part["method"]) else ""
        )
        for label, published in experiment.published.items():
            cells = published.get(str(task), {})
            shown = []
            if not cells:
                continue
            for name, (_, scale, digits, _) in SHOWN.items():
                if name not in cells:
                    shown.append("-")
                    continue
                compared = best and label in experiment.ours and not np.isnan(cells[name].std)
                distance = ours[best][name].distance(cells[name]) if compared else float("nan")
                away = "" if np.isnan(distance) else f" ({distance:+.1f} std)"
                shown.append(cells[name].show(scale, digits) + away)
            rows.append([str(task), label, str(next(iter(cells.values())).count), *shown])
    table = pd.DataFrame(rows, columns=["task", "method", "seeds", *(name for name, *_ in SHOWN.values())])
    return (
        _text(table)
        + "\n\nStd over seeds with ddof = 1. In brackets: our blob (largest N) minus the published mean, in units of "
        f"sqrt(our std^2 + their std^2). {experiment.setting}"
    )


def comparisons_text(results: pd.DataFrame) -> str:
    """Each method against plain LoRA, and against it with a temperature; each variant of BLoB against `blob`."""
    every = list(dict.fromkeys(results["method"]))
    methods = [method for method in every if not method.endswith(SCALED)]
    cheap = "lora" + SCALED
    pairs = [(method, "lora") for method in [*methods, cheap] if method != "lora" and {method, "lora"} <= set(every)]
    pairs += [(method, cheap) for method in methods if method != "lora" and cheap in every]
    pairs += [(method, "blob") for method in methods if method.startswith("blob:") and "blob" in methods]
    rows = []
    for task in dict.fromkeys(results["task"]):
        for method, other in pairs:
            first, second = (_of(results, task, name) for name in (method, other))
            seeds = first.index.intersection(second.index)
            if len(seeds):
                cells = []
                for name, (_, scale, digits, more) in SHOWN.items():
                    found = paired_interval(first.loc[seeds, name], second.loc[seeds, name])
                    better = found.low > 0 if more else found.high < 0
                    worse = found.high < 0 if more else found.low > 0
                    word = " better" if better else " worse" if worse else ""
                    low, high = (f"{scale * end:+.{digits}f}" for end in (found.low, found.high))
                    cells.append(f"{scale * found.value:+.{digits}f} [{low}, {high}]{word}")
                rows.append([task, f"{method} - {other}", str(len(seeds)), *cells])
    if not rows:
        return ""
    table = pd.DataFrame(rows, columns=["task", "difference", "seeds", *(name for name, *_ in SHOWN.values())])
    return (
        "## Differences on the same seeds\n\n"
        + _text(table)
        + "\n\nMean with its 95 % t-interval over seeds, each method with its largest N; *better* or *worse* where the "
        "interval is without 0. Few seeds make wide intervals."
    )


def _of(results: pd.DataFrame, task: str, method: str) -> pd.DataFrame:
    """A method's rows with its largest N, by seed."""
    part = results[(results["task"] == task) & (results["method"] == method)]
    return part[part["N"] == part["N"].max()].set_index("seed")


def _detection_text(detection: pd.DataFrame) -> str:
    rows = []
    for (task, other, method), group in detection.groupby(["task", "other", "method"], sort=False):
        shown = [spread(group[key]).show(1, 3) if group[key].notna().all() else "-" for key in DETECTION]
        rows.append([task, other, method, str(len(group)), *shown])
    names = ("AUROC entropy, N=0", "AUROC entropy", "AUROC mutual information", "AUPR entropy", "FPR95 entropy")
    table = pd.DataFrame(rows, columns=["task", "other data", "method", "seeds", *names])
    return _text(table) + "\n\nThe other data is the positive class; N=S where no N is named (plain LoRA: N=0 alone)."


def costs_text(runs: Mapping[Key, Path]) -> str:
    """What each method cost, as its runs measured it, in ratios to plain LoRA of the same task and seed."""
    costs = {key: _json(path / COSTS_FILE) for key, path in runs.items() if (path / COSTS_FILE).is_file()}
    rows = []
    for method in dict.fromkeys(key[1] for key in costs):
        own = [(cost, costs.get((task, "lora", seed))) for (task, name, seed), cost in costs.items() if name == method]
        first = own[0][0]
        rows.append(
            [
                method,
                f"{first['trained_parameters']:,.0f}",
                _ratio(own, lambda cost: cost["train_runtime"] / cost["train_steps"] if cost["train_steps"] else None),
                _ratio(own, lambda cost: cost["train_runtime"] or None),
                _ratio(own, lambda cost: cost["peak_memory"]),
                f"{first['fit_forwards']:,.0f}" if first["fit_forwards"] else "-",
                f"{first['networks']:.0f}" if "networks" in first else "-",
                _ratio(own, lambda cost: cost["eval_runtime"] / cost["eval_rows"] if cost.get("eval_rows") else None),
            ]
        )
    if not rows:
        return ""
    names = (
        "method", "trained parameters", "train step", "training", "peak memory", "rows passed to fit", "networks S",
        "evaluation of a row",
    )  # fmt: skip
    return (
        "## Costs\n\n" + markdown_table(names, rows) + "\n\nRatios to `lora`, mean over tasks and seeds; times of runs "
        "that may have shared the machine. Laplace and TFB need a trained LoRA besides. Evaluation includes N=0."
    )


def _ratio(pairs: Sequence[tuple[Any, Any]], value: Callable[[Any], float | None]) -> str:
    """Mean of a cost's ratio to plain LoRA's, where both have it."""
    found = [(value(own), None if base is None else value(base)) for own, base in pairs]
    ratios = [own / base for own, base in found if own and base]
    return f"{np.mean(ratios):.2f}" if ratios else "-"


# ----- plots ------------------------------------------------------------------------------------------------------


def draw(folder: Path, runs: Mapping[Key, Path], results: pd.DataFrame) -> list[str]:
    """Plots of the grid, as paths relative to its folder."""
    target = folder / "plots"
    target.mkdir(parents=True, exist_ok=True)
    plot_methods(_to_plot(results), {name: label for name, (label, *_) in SHOWN.items()}, target / "methods.png")
    plots = ["plots/methods.png"]
    for task in dict.fromkeys(results["task"]):
        scores, curves, labels = _pooled(runs, task)
        if scores:
            bins = {method: reliability_bins(values, labels) for method, values in scores.items()}
            plot_reliability(bins, target / f"reliability_{task}.png")
            plot_rejection(curves, target / f"accuracy_rejection_{task}.png")
            plots += [f"plots/reliability_{task}.png", f"plots/accuracy_rejection_{task}.png"]
        shown: dict[str, tuple[int, Path]] = {}  # of each method its first seed
        for (one, method, seed), path in runs.items():
            if one == task and (path / FILE_NAME).is_file():
                shown.setdefault(method, (seed, path))
        histories = {f"{method}, seed {s}": pd.read_csv(path / FILE_NAME) for method, (s, path) in shown.items()}
        if histories:
            plot_trajectories(histories, target / f"kl_{task}.png")
            plots.append(f"plots/kl_{task}.png")
    return plots


def _to_plot(results: pd.DataFrame) -> pd.DataFrame:
    """Of many methods only the unscaled ones with their largest N: more kinds of points could not be told apart."""
    plain = results[~results["method"].str.endswith(SCALED)]
    if plain["method"].nunique() <= 3:
        return plain
    return plain[plain["N"] == plain.groupby("method")["N"].transform("max")]


def _pooled(runs: Mapping[Key, Path], task: str) -> tuple[dict[str, np.ndarray], dict[str, RiskCoverage], np.ndarray]:
    """Predictions of all seeds one after another: log-probabilities and rejection curves by method, and the labels.

    Only seeds that every method has, since one set of labels serves all; nothing where there is no such seed.
    """
    methods = list(dict.fromkeys(method for one, method, _ in runs if one == task))
    seeds = [seed for seed in dict.fromkeys(key[2] for key in runs) if all((task, m, seed) in runs for m in methods)]
    scores: dict[str, np.ndarray] = {}
    curves: dict[str, RiskCoverage] = {}
    labels = np.zeros(0, dtype=int)
    for method in methods if seeds else []:
        tables = [pd.read_json(runs[task, method, s] / "validation_predictions.jsonl", lines=True) for s in seeds]
        table = pd.concat(tables)
        labels = table["label"].to_numpy()
        mean, log_probs = (np.array(table[name].tolist()) for name in ("mean_log_probs", "log_probs"))
        count = int(_json(runs[task, method, seeds[0]] / "eval_results.json")["eval_num_samples"])
        shown = log_probs if count else mean
        scores[_label(method, count)] = shown
        found = rejection_curves(shown[:, None], shown, labels)
        curves[_label(method, count)] = found[MEAN_CURVE]
    return scores, curves, labels
