"""Where the posterior pays: tasks x training sizes x methods x seeds, LoRA with its cheap cures among the methods.

Every seed draws training and held-out rows of its own. The methods that have a strength choose it from three values by
the held-out rows of the first two seeds (BLoB runs at its defaults); nothing is chosen by test rows. All runs are
run_glue_blob.py; flags that are not listed here go to it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import PartialState

from blob_hf import cli
from blob_hf.experiments import study_report
from blob_hf.experiments.grid import GridArguments, GridRun, check_passed_on, complete_runs, refuse_failed
from blob_hf.experiments.study_methods import METHODS, Entry
from blob_hf.experiments.study_settings import SETTINGS, Setting, write_rows
from blob_hf.utils.errors import BlobError

TUNING_SEEDS = 2  # the first ones, by whose held-out rows strengths are chosen
CURVE_SEEDS = 2  # of which LoRA and BLoB are also watched while they train
CURVES = ("lora", "blob")
CURVE_POINTS = 8


@dataclass
class StudyArguments(GridArguments):
    """The grid: settings x methods x seeds."""

    data_dir: str = field(default="data", metadata={"help": "Folder of the tasks' files (docs/evidence.md)."})
    settings: list[str] = field(
        default_factory=lambda: list(SETTINGS), metadata={"help": f"Among {', '.join(SETTINGS)}."}
    )
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": f"Among {', '.join(METHODS)}."})
    seeds: list[int] = field(default_factory=lambda: list(range(1, 9)), metadata={"help": "Seeds of each setting."})
    model_name_or_path: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "The encoder that is fine-tuned."}
    )
    curves: bool = field(default=True, metadata={"help": "Also watch LoRA and BLoB while they train."})
    known_results: str | None = field(
        default=None,
        metadata={
            "help": "results.csv of a study elsewhere: its runs are reported beside those here, and not run again."
        },
    )
    report_only: bool = field(default=False, metadata={"help": "Start no runs; report on those that are complete."})
    output_dir: str = field(default="runs/study", metadata={"help": "Folder of the runs and the report."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("settings", SETTINGS), ("methods", METHODS)):
            for value in getattr(self, name):
                if value not in known:
                    raise BlobError(f"--{name} must be among {', '.join(known)}, got {value!r}")
        self.check_distinct("settings", "methods", "seeds")
        if "lora" not in self.methods:
            raise BlobError("--methods must have lora, which the others are compared with")


def main(argv: Sequence[str]) -> None:
    """Draw the rows, complete the runs, choose strengths on the way, report."""
    args, rest = cli.parse_arguments((StudyArguments,), {}, __doc__ or "", argv, pass_on=True)
    cli.setup_logging(PartialState().is_main_process, quiet_libraries=True)
    check_passed_on(rest, ("task_name", "seed", "method", "train_file", "validation_file", "max_steps"))
    known = read_known(args.known_results)
    folder = Path(args.output_dir)
    cli.claim_folder(folder, {"experiment": "study", "model": args.model_name_or_path, "arguments": rest})
    grid = Grid(args, folder, tuple(rest), known)
    failed: list[GridRun] = []
    for name in args.settings:
        write_rows(SETTINGS[name], args.seeds, Path(args.data_dir), folder / "data" / name)
    # one after another: each is made of what the ones before it have completed
    stages = [grid.first, lambda: grid.tuned(needs_lora=False), lambda: grid.tuned(needs_lora=True)]
    stages += [lambda: list(grid.chosen().values()), lambda: list(grid.curves().values())]
    for stage in [] if args.report_only else stages:
        failed += complete_runs([run for run in stage() if not run.is_complete], "run_glue_blob", args)
    runs, curves = grid.chosen(), grid.curves()
    done = {key: run.folder for key, run in runs.items() if run.is_complete}
    watched = {key: run.folder for key, run in curves.items() if run.is_complete}
    study_report.write(folder, done, watched, grid.strengths(), rest, known)
    refuse_failed(failed, len(runs))


def read_known(path: str | None) -> pd.DataFrame | None:
    """The results of a study elsewhere, as its results.csv has them.

    Raises:
        BlobError: The file is not there, or is no such file.
    """
    if path is None:
        return None
    needed = {"setting", "method", "seed", "strength", *study_report.SHOWN}
    try:
        known = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise BlobError(f"--known_results {path} cannot be read: {error}") from error
    if missing := sorted(needed - set(known.columns)):
        raise BlobError(f"--known_results {path} has no column {missing[0]!r}; it must be results.csv of a study")
    return known


class Grid:
    """The runs of the study by setting, method, strength and seed.

    Args:
        rest: Flags that every run gets.
        known: Results of runs elsewhere, which are not repeated (see `read_known`).
    """

    def __init__(
        self, args: StudyArguments, folder: Path, rest: tuple[str, ...], known: pd.DataFrame | None = None
    ) -> None:
        self.args, self.folder, self.rest = args, folder, rest
        rows = [] if known is None else known.to_dict("records")
        self.known = {(str(row["setting"]), str(row["method"]), int(row["seed"])) for row in rows}
        self.known_strengths = {
            (str(row["setting"]), str(row["method"])): float(row["strength"])
            for row in rows
            if np.isfinite(row["strength"])
        }

    def first(self) -> list[GridRun]:
        """LoRA, to which others are fitted, seed by seed."""
        return [
            self.run(name, "lora", seed)
            for seed in self.args.seeds
            for name in self.args.settings
            if any(
                (name, method, seed) not in self.known
                for method in self.args.methods
                if method == "lora" or METHODS[method].needs_lora
            )
        ]

    def tuned(self, needs_lora: bool) -> list[GridRun]:
        """Every strength of every method on the first seeds."""
        return [
            self.run(name, method, seed, value)
            for seed in self.args.seeds[:TUNING_SEEDS]
            for name in self.args.settings
            for method, entry in self._entries(needs_lora)
            for value in entry.values
            if (name, method) not in self.known_strengths
            if not needs_lora or self.run(name, "lora", seed).is_complete
        ]

    def chosen(self) -> dict[tuple[str, str, int], GridRun]:
        """Every method at its chosen strength, seed by seed; without those that wait for LoRA."""
        strengths = self.strengths()
        return {
            (name, method, seed): self.run(name, method, seed, strengths.get((name, method)))
            for seed in self.args.seeds
            for name in self.args.settings
            for method in self.args.methods
            if (name, method, seed) not in self.known
            if not METHODS[method].needs_lora or self.run(name, "lora", seed).is_complete
        }

    def curves(self) -> dict[tuple[str, str, int], GridRun]:
        """LoRA and BLoB at their strengths, evaluated on the test rows while they train."""
        strengths, runs = self.strengths(), {}
        for seed in self.args.seeds[:CURVE_SEEDS] if self.args.curves else []:
            for name in self.args.settings:
                for method in [one for one in CURVES if one in self.args.methods]:
                    steps = str(max(1, SETTINGS[name].steps // CURVE_POINTS))
                    flags = ("--eval_strategy", "steps", "--eval_steps", steps, "--eval_samples", "5")
                    runs[name, method, seed] = self.run(name, method, seed, strengths.get((name, method)), flags)
        return runs

    def strengths(self) -> dict[tuple[str, str], float]:
        """Of each method the strength under which held-out rows have the smallest NLL; the default until known."""
        found = {}
        for name in self.args.settings:
            for method in self.args.methods:
                entry = METHODS[method]
                if (name, method) in self.known_strengths:
                    found[name, method] = self.known_strengths[name, method]
                elif entry.strength:
                    losses = {value: self._held_out_nll(name, method, value) for value in entry.values}
                    found[name, method] = min(entry.values, key=lambda value: losses[value])
        return found

    def _held_out_nll(self, name: str, method: str, value: float) -> float:
        runs = [self.run(name, method, seed, value) for seed in self.args.seeds[:TUNING_SEEDS]]
        paths = [run.folder / "calibration_results.json" for run in runs if run.is_complete]
        known = [json.loads(path.read_text(encoding="utf-8"))["calibration_nll"] for path in paths]
        return float(np.mean(known)) if known else np.inf

    def _entries(self, needs_lora: bool) -> list[tuple[str, Entry]]:
        return [
            (method, METHODS[method])
            for method in self.args.methods
            if METHODS[method].strength and METHODS[method].needs_lora == needs_lora
        ]

    def run(
        self, name: str, method: str, seed: int, value: float | None = None, watch: tuple[str, ...] = ()
    ) -> GridRun:
        """One run.

        Args:
            value: Of the method's strength.
            watch: Flags of a run that is watched while it trains.
        """
        setting, entry = SETTINGS[name], METHODS[method]
        label = method if value is None else f"{method}-{value:g}"
        label = f"{label}-curve" if watch else label
        run_name = f"{name}/{label}/seed{seed}"
        flags = [*setting_flags(setting, self.folder / "data" / name, seed), *entry.flags]
        flags += ["--model_name_or_path", self.args.model_name_or_path, "--seed", str(seed), "--temperature_scaling"]
        if value is not None and entry.strength:
            flags += [f"--{entry.strength}", f"{value:g}"]
        if entry.needs_lora:
            flags += ["--adapter_name_or_path", str(self.folder / "runs" / name / "lora" / f"seed{seed}")]
        return GridRun(run_name, self.folder / "runs" / run_name, (*flags, *watch, *self.rest))


def setting_flags(setting: Setting, data: Path, seed: int) -> list[str]:
    """The flags of a setting and its rows."""
    flags = [
        "--train_file", str(data / f"seed{seed}" / "train.jsonl"), "--validation_file", str(data / "test.jsonl"),
        "--calibration_file", str(data / f"seed{seed}" / "held_out.jsonl"),
        "--text_columns", *setting.columns, "--max_steps", str(setting.steps), "--max_length", "64",
        "--per_device_train_batch_size", str(setting.batch_size), "--learning_rate", f"{setting.learning_rate:g}",
        "--per_device_eval_batch_size", "50", "--save_strategy", "no", "--report_to", "none",
    ]  # fmt: skip
    if setting.task == "wic":  # whose texts begin with the word
        flags = [part for part in flags if part not in ("--text_columns", *setting.columns)]
        flags += ["--task_name", "wic"]
    if setting.ood:
        flags += ["--ood_file", f"oos={data / 'ood.jsonl'}"]
    flags += ["--target_modules", *setting.targets] if setting.targets else ["--train_head", "false"]  # as published
    return flags
