"""Experiment II: what beta and gamma do to a summarizer, with the figures that explain it.

Every flag that is not listed here goes to run_summarization_blob.py; published: its defaults with 1,500 steps.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from accelerate import PartialState

from blob_hf import cli
from blob_hf.cli.artifacts import VERDICT_FILE
from blob_hf.experiments.grid import GridArguments, GridRun, check_passed_on, complete_runs, refuse_failed
from blob_hf.reporting.kl_plots import plot_trajectories
from blob_hf.reporting.tables import markdown_table
from blob_hf.trainer.kl.history import FILE_NAME
from blob_hf.trainer.kl.rate import PUBLISHED_RATE
from blob_hf.utils import files

Key = tuple[float, float]  # beta, gamma

# [K], experiment II: BART-base on DialogSum, 1,500 steps of batch 16, S = 10, 1 seed.
# KL loss and ELBO are running averages; ROUGE-1, -2, -L.
PUBLISHED: dict[Key, tuple[float, float, float, float, float]] = {
    (0.1, 4): (0.0, 1200935.81, 0.4336, 0.1698, 0.3524),
    (0.1, 8): (1357.78, 356901.46, 0.4336, 0.1669, 0.3508),
    (0.1, 12): (690.86, 47876.46, 0.4324, 0.1641, 0.3474),
    (0.2, 4): (0.0, 1425236.30, 0.4325, 0.1699, 0.3532),
    (0.2, 8): (2205.69, 577324.49, 0.4371, 0.1694, 0.3542),
    (0.2, 12): (2679.37, 187909.72, 0.4341, 0.1651, 0.3487),
    (0.3, 4): (0.0, 1560386.59, 0.4344, 0.1709, 0.3531),
    (0.3, 8): (2720.78, 711101.24, 0.4354, 0.1697, 0.3530),
    (0.3, 12): (4300.17, 302429.51, 0.4360, 0.1701, 0.3518),
}
_DASHES = ("-", "--", ":", "-.")


@dataclass
class SensitivityArguments(GridArguments):
    """The grid: beta x gamma."""

    beta: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3], metadata={"help": "Stds of the prior."})
    gamma: list[float] = field(default_factory=lambda: [4.0, 8.0, 12.0], metadata={"help": "gamma, for the cycle M."})
    output_dir: str = field(default="runs/experiment-sensitivity", metadata={"help": "Folder of runs and report."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_distinct("beta", "gamma")


def main(argv: Sequence[str]) -> None:
    """Complete the runs, report on those that there are."""
    args, rest = cli.parse_arguments((SensitivityArguments,), {}, __doc__ or "", argv, pass_on=True)
    cli.setup_logging(PartialState().is_main_process, quiet_libraries=True)
    check_passed_on(rest, ("method",))
    if not any(part.split("=")[0] == "--max_steps" for part in rest):
        rest += ["--max_steps", "1500"]
    folder = Path(args.output_dir)
    runs = {(beta, gamma): _run(folder, rest, beta, gamma) for beta in args.beta for gamma in args.gamma}
    cli.claim_folder(folder, {"experiment": "sensitivity", "arguments": rest})
    failed = complete_runs(list(runs.values()), "run_summarization_blob", args)
    _report(folder, {key: run.folder for key, run in runs.items() if run.is_complete}, rest)
    refuse_failed(failed, len(runs))


def _run(folder: Path, rest: Sequence[str], beta: float, gamma: float) -> GridRun:
    name = f"beta{beta:g}-gamma{gamma:g}"
    published = () if {"--kl_learning_rate", "--kl_pull"} & set(rest) else ("--kl_learning_rate", f"{PUBLISHED_RATE:g}")
    own = ("--beta", f"{beta:g}", "--gamma", f"{gamma:g}", *published)
    return GridRun(name, folder / "runs" / name, (*own, *rest))


def _report(folder: Path, runs: Mapping[Key, Path], arguments: Sequence[str]) -> None:
    if not runs:
        return
    table = pd.DataFrame([_row(*key, path) for key, path in runs.items()])
    files.write_text(folder / "results.csv", table.to_csv(index=False))
    histories = {
        f"beta {beta:g}, gamma {gamma:g}": pd.read_csv(path / FILE_NAME) for (beta, gamma), path in runs.items()
    }
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    plot_trajectories(histories, folder / "plots" / "trajectories.png", _styles(list(runs)))
    text = _text(table, arguments)
    files.write_text(folder / "report.md", text)
    print(text)
    print(f"Everything is in {folder}")


def _row(beta: float, gamma: float, path: Path) -> dict[str, Any]:
    verdict = json.loads((path / VERDICT_FILE).read_text(encoding="utf-8"))
    name = next(name for name in ("predict", "eval") if (path / f"{name}_results.json").is_file())
    found = json.loads((path / f"{name}_results.json").read_text(encoding="utf-8"))
    weights, prior = verdict["num_weights"], verdict["prior_std"]
    return {
        "beta": beta,
        "gamma": gamma,
        "verdict": verdict["verdict"],
        "cycle": verdict["cycle_steps"],
        "cycles": verdict["steps"] / verdict["cycle_steps"],
        "total_weight": verdict["total_weight"],
        "exposure": verdict["exposure"],
        "kl_start": verdict["kl_start"],
        "kl_end": verdict["kl_end"],
        "kl_start_per_weight": verdict["kl_start"] / weights,
        "kl_end_per_weight": verdict["kl_end"] / weights,
        "share_moved": verdict["share_moved"],
        "std_over_prior": verdict["std_end"] / prior,
        "mean_kl_loss": verdict["mean_kl_loss"],
        "mean_elbo": verdict["mean_elbo"],
        **{key: found[f"{name}_{key}"] for key in ("rouge1", "rouge2", "rougeL", "nll", "mean_nll", "sample_nll")},
        "samples": found[f"{name}_num_samples"],
        "split": {"predict": "test", "eval": "validation"}[name],
    }


def _text(table: pd.DataFrame, arguments: Sequence[str]) -> str:
    split, samples = table["split"].iloc[0], table["samples"].iloc[0]
    parts = [
        "# Experiment II: what beta and gamma do",
        f"{len(table)} runs of run_summarization_blob.py {' '.join(arguments)}",
        "beta is the prior's std; gamma sets the cycle M = int(100 * n**(pi/gamma) / global batch), whose last few "
        "steps have nearly all the weight of the KL. Where M is longer than the run the KL is never applied.",
        "## What the KL did",
        _kl_table(table),
        "## Results beside the published table",
        _results_table(table),
        f"{split}, {samples} posterior samples. KL loss (pi_t * KL) and ELBO (NLL + KL) are means over the steps, like "
        "the published values in brackets (BART-base, 1,500 steps), whose KL is summed over that model's weights.",
        "![trajectories](plots/trajectories.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _kl_table(table: pd.DataFrame) -> str:
    head = (
        "beta", "gamma", "verdict", "cycle M", "cycles", "sum of pi_t", "times lr shape", "KL start", "KL end",
        "per weight", "stds moved", "std / prior",
    )  # fmt: skip
    rows = [
        [
            f"{row['beta']:g}", f"{row['gamma']:g}", str(row["verdict"]), str(row["cycle"]), f"{row['cycles']:.2f}",
            f"{row['total_weight']:.2g}", f"{row['exposure']:.2g}", f"{row['kl_start']:.0f}", f"{row['kl_end']:.0f}",
            f"{row['kl_start_per_weight']:.2f} -> {row['kl_end_per_weight']:.2f}",
            f"{100 * row['share_moved']:.0f} %", f"{row['std_over_prior']:.3f}",
        ]
        for row in table.to_dict("records")
    ]  # fmt: skip
    return markdown_table(head, rows)


def _results_table(table: pd.DataFrame) -> str:
    names = ("mean_kl_loss", "mean_elbo", "rouge1", "rouge2", "rougeL")
    digits = (2, 2, 4, 4, 4)
    rows = []
    for row in table.to_dict("records"):
        published = PUBLISHED.get((row["beta"], row["gamma"]), (math.nan,) * 5)
        cells = [
            f"{row[name]:.{places}f}" + ("" if math.isnan(value) else f" ({value:.{places}f})")
            for name, places, value in zip(names, digits, published, strict=True)
        ]
        nlls = [f"{row[name]:.4f}" for name in ("mean_nll", "nll", "sample_nll")]
        rows.append([f"{row['beta']:g}", f"{row['gamma']:g}", *cells, *nlls])
    head = ("beta", "gamma", "KL loss", "ELBO", "ROUGE-1", "ROUGE-2", "ROUGE-L", "NLL, N=0", "NLL", "NLL of a sample")
    return markdown_table(head, rows)


def _styles(keys: Sequence[Key]) -> dict[str, dict[str, Any]]:
    """Colour by gamma, dash by beta."""
    gammas, betas = (list(dict.fromkeys(key[i] for key in keys)) for i in (1, 0))
    colours = sns.color_palette("colorblind", len(gammas))
    return {
        _label(key): {"color": colours[gammas.index(key[1])], "linestyle": _DASHES[betas.index(key[0]) % len(_DASHES)]}
        for key in keys
    }


def _label(key: Key) -> str:
    return f"beta {key[0]:g}, gamma {key[1]:g}"
