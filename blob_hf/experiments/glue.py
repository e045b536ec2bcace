"""Experiments I and V: the tasks of the papers, BLoB against its peers, mean +- std over seeds.

Every flag that is not listed here goes to run_glue_blob.py (for `multiple_choice`: run_multiple_choice_blob.py), with
`{task}` filled in; its defaults are the published setting.
Methods that are fitted to a trained adapter (laplace, tfb) take the one of `lora` with the same task and seed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from accelerate import PartialState

from blob_hf import cli
from blob_hf.cli.route import FittedRoute
from blob_hf.cli.routes import ROUTES
from blob_hf.experiments import glue_report
from blob_hf.experiments.grid import GridArguments, GridRun, check_passed_on, complete_runs, refuse_failed
from blob_hf.experiments.published import GLUE, MULTIPLE_CHOICE, Experiment
from blob_hf.utils.errors import BlobError


@dataclass
class GlueArguments(GridArguments):
    """The grid: tasks x methods x seeds."""

    experiment: ClassVar[Experiment] = GLUE
    tasks: list[str] = field(default_factory=lambda: list(GLUE.default), metadata={"help": "Tasks."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds of each task and method."})
    methods: list[str] = field(
        default_factory=lambda: ["blob", "lora"],
        metadata={
            "help": f"Among {', '.join(ROUTES)}, alone or with settings of run_glue_blob.py: "
            "blob:kl_schedule=elbo,beta=0.1"
        },
    )
    output_dir: str = field(default="runs/experiment-glue", metadata={"help": "Folder of the runs and the report."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for task in self.tasks:
            if task not in self.experiment.tasks:
                raise BlobError(f"--tasks must be among {', '.join(self.experiment.tasks)}, got {task!r}")
        self.check_distinct("tasks", "seeds", "methods")
        for method in self.methods:
            method_arguments(method)
        waiting = [method for method in self.methods if _needs_lora(method)]
        if waiting and "lora" not in self.methods:
            raise BlobError(f"{waiting[0]} is fitted to the adapters of lora: name lora among --methods, too")


@dataclass
class ChoiceArguments(GlueArguments):
    """The same for multiple choice."""

    experiment: ClassVar[Experiment] = MULTIPLE_CHOICE
    tasks: list[str] = field(default_factory=lambda: list(MULTIPLE_CHOICE.default), metadata={"help": "Tasks."})
    output_dir: str = field(default="runs/experiment-choice", metadata={"help": "Folder of the runs and the report."})


def main(argv: Sequence[str]) -> None:
    """Complete the runs of experiment I, report on those that there are."""
    run(GlueArguments, argv)


def multiple_choice(argv: Sequence[str]) -> None:
    """The same for experiment V."""
    run(ChoiceArguments, argv)


def run(kind: type[GlueArguments], argv: Sequence[str]) -> None:
    """Complete the runs, report on those that there are."""
    args, rest = cli.parse_arguments((kind,), {}, __doc__ or "", argv, pass_on=True)
    experiment = kind.experiment
    cli.setup_logging(PartialState().is_main_process, quiet_libraries=True)
    folder = Path(args.output_dir)
    check_passed_on(rest, ("task_name", "seed", "method"))
    runs = {key: _run(folder, rest, *key) for key in _keys(args)}
    cli.claim_folder(folder, {"experiment": experiment.name, "arguments": rest})
    first = [run for (_, method, _), run in runs.items() if not _needs_lora(method)]
    failed = complete_runs(first, experiment.script, args)
    ready = [run for key, run in runs.items() if _needs_lora(key[1]) and runs[key[0], "lora", key[2]].is_complete]
    failed += complete_runs(ready, experiment.script, args)
    glue_report.write(folder, {key: run.folder for key, run in runs.items() if run.is_complete}, rest, experiment)
    refuse_failed(failed, len(runs))


def _keys(args: GlueArguments) -> list[tuple[str, str, int]]:
    return [(task, method, seed) for task in args.tasks for method in args.methods for seed in args.seeds]


def _run(folder: Path, rest: Sequence[str], task: str, method: str, seed: int) -> GridRun:
    name = _run_name(task, method, seed)
    own = ["--task_name", task, "--seed", str(seed), *method_arguments(method)]
    if _needs_lora(method):
        own += ["--adapter_name_or_path", str(folder / "runs" / _run_name(task, "lora", seed))]
    passed = tuple(part.replace("{task}", task) for part in rest)
    return GridRun(name, folder / "runs" / name, (*own, *passed))


def _run_name(task: str, method: str, seed: int) -> str:
    return f"{task}/{re.sub(r'[^A-Za-z0-9.]+', '-', method)}/seed{seed}"


def _needs_lora(method: str) -> bool:
    """Whether a method, with its settings, is fitted to the adapter that `lora` trains."""
    return isinstance(
        ROUTES[method.partition(":")[0]], FittedRoute
    ) and "--adapter_name_or_path" not in method_arguments(method)


def method_arguments(method: str) -> tuple[str, ...]:
    """Flags of `blob:kl_schedule=elbo,beta=0.1`.

    Raises:
        BlobError: Unknown method, or a setting without a value.
    """
    base, _, settings = method.partition(":")
    if base not in ROUTES:
        raise BlobError(f"--methods must be among {', '.join(ROUTES)}, with settings after a colon; got {method!r}")
    flags = ["--method", base]
    for setting in settings.split(",") if settings else []:
        name, sign, value = setting.partition("=")
        if not (name and sign and value):
            raise BlobError(f"settings of a method are name=value with commas between, got {method!r}")
        flags += [f"--{name}", value]
    return tuple(flags)
