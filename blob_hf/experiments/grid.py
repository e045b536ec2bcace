"""Runs of a grid: a command and a folder each; complete ones are reused, interrupted ones go on where they were.

Where and when a run starts is the launcher's business (`accelerate launch`, `srun`, ...), not ours.
"""

import importlib.util
import logging
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from tqdm.auto import tqdm

from blob_hf.trainer.checkpoints import newest_complete
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

LOG_FILE = "run.log"
FORK = "fork"
_OURS = ("output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict")


@dataclass
class GridArguments:
    """How the runs of a grid are started."""

    launcher: str | None = field(
        default=None,
        metadata={
            "help": "Command before each run's script, {name} filled in. Default: accelerate launch. fork: each run "
            "is a fork of one warm process, which saves many short runs on a CPU the imports."
        },
    )
    jobs: int = field(default=1, metadata={"help": "Runs at the same time."})

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise BlobError(f"--jobs must be >= 1, got {self.jobs}")

    def check_distinct(self, *names: str) -> None:
        """Refuse an axis of the grid that is empty or has a value twice."""
        for name in names:
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise BlobError(f"--{name} must be different values, one or more, got {values}")


def check_passed_on(rest: Sequence[str], taken: Sequence[str]) -> None:
    """Refuse arguments for the script that the experiment itself sets.

    Raises:
        BlobError: naming the first one.
    """
    for part in rest:
        name = part.split("=")[0].removeprefix("--")
        if part.startswith("--") and name in (*_OURS, *taken):
            raise BlobError(f"--{name} is set by the experiment for each run; leave it out")


@dataclass(frozen=True)
class GridRun:
    """One run: its name, its folder, and what the script gets besides `--output_dir`."""

    name: str
    folder: Path
    arguments: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether it has been trained, evaluated and reported on (the report is written last)."""
        return (self.folder / "report.md").is_file() and any(self.folder.glob("*_results.json"))


def script_path(name: str) -> str:
    """Path of one of our scripts: beside the package, or installed with it.

    Raises:
        BlobError: It is not there.
    """
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise BlobError(f"{name}.py is not installed; run from a checkout of blob_hf, or install the package")
    return found.origin


def complete_runs(runs: Sequence[GridRun], script: str, args: GridArguments) -> list[GridRun]:
    """Bring every run of a grid to its end, and say which ones failed.

    Args:
        script: Module name of the script, for example "run_glue_blob".

    Returns:
        The runs that failed; the last line of their run.log has been logged.

    Raises:
        BlobError: The experiment itself was started as several processes, or two runs have the same folder.
    """
    if len({run.folder for run in runs}) < len(runs):
        raise BlobError("two runs of the grid would share a folder; write their settings so that their names differ")
    if PartialState().num_processes > 1:
        raise BlobError("start this experiment as one process; --launcher says how each of its runs is started")
    todo = [run for run in runs if not run.is_complete]
    if len(todo) < len(runs):
        logger.info("%d of %d runs are complete already", len(runs) - len(todo), len(runs))
    path = script_path(script)
    with ThreadPoolExecutor(max_workers=args.jobs) as pool, tqdm(total=len(todo), desc="runs", unit="run") as progress:

        def one(run: GridRun) -> bool:
            succeeded = _complete(run, path, args.launcher)
            progress.update()
            return succeeded

        succeeded = list(pool.map(one, todo))
    return [run for run, good in zip(todo, succeeded, strict=True) if not good]


def refuse_failed(failed: Sequence[GridRun], count: int) -> None:
    """Raise a BlobError that names the failed runs of `count`, if there are any."""
    if failed:
        names = ", ".join(run.name for run in failed)
        raise BlobError(f"{len(failed)} of {count} runs failed ({names}); the report has the others")


def command(run: GridRun, path: str, launcher: str | None) -> list[str]:
    """The command line of a run."""
    if launcher is None:
        prefix = [sys.executable, "-m", "accelerate.commands.launch"]
    else:
        prefix = [part.replace("{name}", run.name.replace("/", "-")) for part in shlex.split(launcher)]
    resume = ["--resume_from_checkpoint", "true"] if newest_complete(run.folder) else []
    return [*prefix, path, *run.arguments, "--output_dir", str(run.folder), *resume]


def _complete(run: GridRun, path: str, launcher: str | None) -> bool:
    run.folder.mkdir(parents=True, exist_ok=True)
    line = command(run, path, None if launcher == FORK else launcher)
    log = run.folder / LOG_FILE
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ {shlex.join(line)}\n")
    code = _fork(line[line.index(path) :], log) if launcher == FORK else _start(line, log)
    if code == 0 and run.is_complete:
        return True
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    shown = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    logger.error("%s failed with exit code %d: %s (all of it: %s)", run.name, code, shown, log)
    return False


def _start(line: Sequence[str], log: Path) -> int:
    """Run a command to its end; its exit code."""
    with log.open("a", encoding="utf-8") as output:
        try:
            return subprocess.run(line, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        except OSError as error:
            raise BlobError(f"cannot start {line[0]} ({error.strerror}); set --launcher") from error


def _fork(argv: Sequence[str], log: Path) -> int:
    """Run a script to its end in a fork of a server process that has imported what it needs; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["blob_hf", Path(argv[0]).stem])
    process = context.Process(target=_run_script, args=(list(argv), str(log)))
    try:
        process.start()
    except (EOFError, OSError) as error:
        raise BlobError(
            "the process that runs are forked from was ended; the same command goes on from the runs that are complete"
        ) from error
    process.join()
    return process.exitcode or 0


def _run_script(argv: list[str], log: str) -> None:
    """Be the script: in a fresh process, with its output in the log."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
