"""Ways to predict from a case's networks: what each costs, and what it loses, as tables and a picture."""

import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from frontier.cases import DRAWN, Case
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

from blob_hf import Sampling
from blob_hf.inference.settling import settle
from blob_hf.metrics.calibration import ece, nll
from blob_hf.metrics.detection import detection_metrics
from blob_hf.metrics.uncertainty import predictive_entropy

TOLERANCES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15)
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Way:
    """A way to predict: its cost in plain forwards, and log-probabilities `(rows, classes)` of independent trials."""

    name: str
    cost: float
    trials: list[Scores]


def averaged(samples: NDArray[Any]) -> Scores:
    """log mean_s p_s."""
    return logsumexp(samples.astype(np.float64), axis=1) - np.log(samples.shape[1])


def windows(samples: NDArray[Any], count: int) -> Iterator[NDArray[Any]]:
    for start in range(0, samples.shape[1] - count + 1, count):
        yield samples[:, start : start + count]


def ways(case: Case) -> Iterator[Way]:
    """All of a case, the reference last."""
    kept, total = case.kept, case.layers
    rng = np.random.default_rng(0)
    yield Way("N=0", 1, [averaged(kept["mean"])])
    for count in range(1, 11):
        chosen = [rng.choice(kept["iid"].shape[1], count, replace=False) for _ in range(40)]
        yield Way(f"iid N={count}", count, [averaged(kept["iid"][:, own]) for own in chosen])
    for draw in ("antithetic", "qmc"):
        for count in (2, 4, 6, 8, 10):
            yield Way(f"{draw} N={count}", count, [averaged(one) for one in windows(kept[draw], count)])
    own = np.random.default_rng(1)
    yield Way("Student's t of N=4", 4, [student_t(pairs, own) for pairs in windows(kept["antithetic"], 4)])
    for k in case.trunks:
        samples, share = kept[f"trunk {k}"], k / total
        for count in (4, 6, 10):
            trials = [averaged(one) for one in windows(samples, count)]
            yield Way(f"trunk k={k} N={count}", 1 + (count - 1) * share, trials)
    enough = kept["antithetic"].shape[1] >= Sampling.auto().num_samples
    for tolerance in TOLERANCES if enough and not case.writes else ():  # a text has no one probability that settles
        yield automatic(f"auto {tolerance:g}", kept["antithetic"], tolerance)
    if "student" in kept:
        yield Way("distilled", 1, [averaged(kept["student"])])
    if "linearized" in kept:
        yield from closed_forms(kept["linearized"], rng)
    every = np.concatenate([kept[draw] for draw in DRAWN], axis=1)
    yield Way("reference", every.shape[1], [averaged(every)])


def student_t(pairs: NDArray[Any], rng: np.random.Generator) -> Scores:
    """Logits of antithetic pairs as draws of a Gaussian, integrated over it and over how wide it may be.

    Each pair is one draw of the odd part, so that S samples leave S / 2 degrees of freedom.
    """
    logits = pairs.astype(np.float64) - pairs.mean(axis=2, keepdims=True)
    mean, count = logits.mean(axis=1, keepdims=True), logits.shape[1]
    noise = rng.normal(size=(len(logits), 400, count)) / np.sqrt(count) @ (logits - mean)
    width = np.sqrt(rng.chisquare(count / 2, size=(len(logits), 400, 1)) / (count / 2))
    return averaged(log_softmax(mean + noise / width, axis=2))


def automatic(name: str, samples: NDArray[Any], tolerance: float) -> Way:
    """As many samples as needed, of those that were drawn."""
    sampling = Sampling.auto(tolerance)
    trials, costs = [], []
    for pool in windows(samples, sampling.num_samples):
        found = settle(
            len(pool), sampling, lambda rows, part, pool=pool: pool[list(rows)][:, part.first : part.indices.stop]
        )
        trials.append(averaged(found.log_probs))
        costs.append(found.networks.mean())
    return Way(name, float(np.mean(costs)), trials)


def closed_forms(moments: NDArray[Any], rng: np.random.Generator) -> Iterator[Way]:
    mean, covariance = moments[..., 0].astype(np.float64), moments[..., 1:].astype(np.float64)
    classes = mean.shape[1]
    # a backward pass through frozen weights costs about what a forward does
    cost = 1 + classes
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    yield Way("closed form, probit", cost, [log_softmax(mean / np.sqrt(1 + np.pi / 8 * variance), axis=1)])
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(min=0))[:, None]
    draws = mean[:, None] + rng.normal(size=(500, classes)) @ root.transpose(0, 2, 1)
    yield Way("closed form, integrated", cost, [averaged(log_softmax(draws, axis=2))])


# ----- what they lose ---------------------------------------------------------------------------------------------

METRICS = ("nll", "ece", "auroc")


def scored(log_probs: Scores, labels: NDArray[np.int64], writes: bool) -> dict[str, float]:
    count = len(labels)
    scores = log_softmax(log_probs, axis=1)
    found = {"nll": nll(scores[:count], labels)}
    if not writes:  # what else a token could have been was not kept
        found["ece"] = ece(scores[:count], labels)
    if len(scores) > count:
        entropy = predictive_entropy(scores[:, None])
        found["auroc"] = detection_metrics(entropy[:count], entropy[count:])["auroc"]
    return found


Table = dict[str, dict[str, float]]


def table_of(cases: list[Case]) -> Table:
    """By way: its cost, and the means of its metrics over the cases of a setting."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        for way in ways(case):
            values[way.name]["cost"].append(way.cost)
            each = [scored(trial, case.kept["labels"], case.writes) for trial in way.trials]
            for metric in each[0]:
                values[way.name][metric].append(float(np.mean([one[metric] for one in each])))
    whole = {name: found for name, found in values.items() if len(found["cost"]) == len(cases)}  # else not comparable
    return {name: {key: float(np.mean(one)) for key, one in found.items()} for name, found in whole.items()}


def kept_gain(table: Table, name: str, metric: str) -> float:
    """Of what iid N=10 gains over N=0 the share that a way keeps; NaN where it gains nothing."""
    none, ten = table["N=0"][metric], table["iid N=10"][metric]
    better = ten > none if metric == "auroc" else ten < none
    return (table[name][metric] - none) / (ten - none) if better and abs(ten - none) > 0.002 else float("nan")


def markdown(table: Table) -> str:
    lines = ["| way | forwards | NLL | of N=10's gain | ECE | of N=10's gain | AUROC | of N=10's gain |"]
    lines.append("| --- " + "| ---: " * 7 + "|")
    for name, found in table.items():
        cells = [name, f"{found['cost']:.1f}"]
        for metric in METRICS:
            gain = kept_gain(table, name, metric) if metric in found else float("nan")
            cells += [f"{found[metric]:.3f}" if metric in found else "", f"{gain:.0%}" if np.isfinite(gain) else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measured(cases: list[Case]) -> str:
    """Processor time in plain forwards over the count of forwards, medians over cases."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        plain = statistics.median(float(case.kept[key]) for key in case.kept if key.startswith("seconds/mean"))
        for name in case.kept:
            if f"seconds/{name}" in case.kept and "mean" not in name:
                samples = case.kept[name].shape[1]
                share = int(name.split()[1]) / case.layers if name.startswith("trunk") else 1
                counted = 1 + samples if name == "linearized" else 1 + (samples - 1) * share
                ratios[name].append(float(case.kept[f"seconds/{name}"]) / plain / counted)
    lines = ["| way | processor time over count |", "| --- | ---: |"]
    return "\n".join(lines + [f"| {name} | {statistics.median(values):.2f} |" for name, values in ratios.items()])


def plot(tables: dict[str, Table], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wide = min(3, len(tables) + 1)  # one panel is for the legend
    high = -(-(len(tables) + 1) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(4.2 * wide, 3.4 * high), squeeze=False)
    panels = list(axes.flat)
    kinds = {
        "iid": ("iid", "o-"), "antithetic": ("antithetic", "s-"), "qmc": ("evenly spread (qmc)", "^:"),
        "trunk": ("shared trunk, N=6", "D-"), "auto": ("as many as needed", "v-"),
        "closed": ("closed form", "x"), "distilled": ("distilled", "P"),
    }  # fmt: skip
    for axis, (setting, table) in zip(panels, tables.items(), strict=False):
        for kind, (label, style) in kinds.items():
            names = [one for one in table if one.startswith(kind) and (kind != "trunk" or one.endswith("N=6"))]
            points = sorted((table[one]["cost"], table[one]["nll"]) for one in names)
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1)
        axis.plot(1, table["N=0"]["nll"], "k*", label="posterior mean, N=0")
        axis.axhline(table["reference"]["nll"], color="grey", linewidth=0.8, label="all networks that were drawn")
        axis.set(title=setting, xlabel="cost, plain forwards", xlim=(0.5, 11), ylabel="NLL, nats")
        top = max(table["N=0"]["nll"], table["iid N=2"]["nll"])
        axis.set_ylim(min(min(line.get_ydata()) for line in axis.lines) * 0.98, top * 1.05)
    named = {}
    for axis in panels[: len(tables)]:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    for axis in panels[len(tables) :]:
        axis.axis("off")
    panels[-1].legend(named.values(), named.keys(), loc="center")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
