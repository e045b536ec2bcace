"""What to label next: pool-based active learning, by what BLoB's networks disagree about and by its rivals.

In each round a model is trained anew on the rows that are labelled so far (a run of run_glue_blob.py), and a strategy
chooses by it which rows of the pool are labelled next, as `blob acquire` does. An arm is a method and a strategy, and
is compared with random rows for the same method; the first round is the same for all strategies of a method. Rounds
that are complete are reused. Flags that are not listed here go to run_glue_blob.py.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from datasets import Dataset

from blob_hf import cli
from blob_hf.cli.acquire import CANDIDATES, acquire_rows, rows_by_chance
from blob_hf.cli.adapters import load_networks
from blob_hf.cli.pool import Pool
from blob_hf.cli.route import FittedRoute
from blob_hf.cli.routes import ROUTES
from blob_hf.experiments import active_report
from blob_hf.experiments.active_settings import ACTIVE, DEFAULT, ActiveSetting, read_pool, texts_and_label, write_pool
from blob_hf.experiments.grid import GridArguments, GridRun, check_passed_on, complete_runs, refuse_failed
from blob_hf.experiments.study_settings import read_rows
from blob_hf.metrics.acquisition import OF_NETWORKS, STRATEGIES
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

ARMS = ("blob-random", "blob-entropy", "blob-bald", "blob-batchbald", "lora-random", "lora-entropy")
RANDOM = "random"
_FIXED = ("task_name", "seed", "method", "train_file", "validation_file", "adapter_name_or_path")


@dataclass
class ActiveArguments(GridArguments):
    """The grid: settings x arms x seeds, round by round."""

    data_dir: str = field(default="data", metadata={"help": "Folder of the tasks' files (docs/evidence.md)."})
    settings: list[str] = field(default_factory=lambda: list(DEFAULT), metadata={"help": f"Among {', '.join(ACTIVE)}."})
    arms: list[str] = field(
        default_factory=lambda: list(ARMS),
        metadata={"help": f"METHOD-STRATEGY, of {', '.join(STRATEGIES)}; with METHOD-random of each method."},
    )
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds of each setting."})
    rounds: int = field(default=4, metadata={"help": "Rounds in which rows are chosen, after the first training."})
    count: int | None = field(default=None, metadata={"help": "Rows chosen in a round. Default: the setting's."})
    acquire_samples: int = field(default=16, metadata={"help": "Networks that are asked about the pool."})
    acquire_layers: int | None = field(
        default=None, metadata={"help": "They differ in the last so many layers, which costs less. Default: in all."}
    )
    model_name_or_path: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "The encoder that is fine-tuned."}
    )
    report_only: bool = field(default=False, metadata={"help": "Start no runs; report on those that are complete."})
    output_dir: str = field(default="runs/active", metadata={"help": "Folder of the rounds and the report."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.settings:
            if name not in ACTIVE:
                raise BlobError(f"--settings must be among {', '.join(ACTIVE)}, got {name!r}")
        self.check_distinct("settings", "arms", "seeds")
        if self.rounds < 1:
            raise BlobError(f"--rounds must be >= 1, got {self.rounds}")
        self.sampling(0)  # refuses what is out of range
        for arm in self.arms:
            self._check_arm(arm)
        for name in self.settings:
            setting, count = ACTIVE[name], self.count_of(ACTIVE[name])
            if not 1 <= count * self.rounds <= setting.task.rows * setting.copies:
                raise BlobError(
                    f"{self.rounds} rounds of {count} rows cannot be chosen from the pool of {name}, which has "
                    f"{setting.task.rows * setting.copies}; set --rounds or --count"
                )

    def _check_arm(self, arm: str) -> None:
        method, _, strategy = arm.rpartition("-")
        if method not in ROUTES or isinstance(ROUTES[method], FittedRoute) or strategy not in STRATEGIES:
            known = ", ".join(name for name, route in ROUTES.items() if not isinstance(route, FittedRoute))
            raise BlobError(
                f"--arms are a method that is trained ({known}), a hyphen and a strategy ({', '.join(STRATEGIES)}); "
                f"got {arm!r}"
            )
        if strategy in OF_NETWORKS and (not ROUTES[method].card.sampled or self.acquire_samples < 2):
            raise BlobError(f"--arms {arm}: {strategy} compares two or more networks, and there is one")
        if f"{method}-{RANDOM}" not in self.arms:
            raise BlobError(f"--arms must have {method}-{RANDOM}, which {arm} is compared with")

    def count_of(self, setting: ActiveSetting) -> int:
        """Rows that are chosen in a round."""
        return setting.count if self.count is None else self.count

    def sampling(self, seed: int) -> Sampling:
        """The networks that are asked about the pool."""
        return Sampling(self.acquire_samples, seed, layers=self.acquire_layers)


def main(argv: Sequence[str]) -> None:
    """Draw the pools, complete round after round, report."""
    args, rest = cli.parse_arguments((ActiveArguments,), {}, __doc__ or "", argv, pass_on=True)
    cli.setup_logging(PartialState().is_main_process, quiet_libraries=True)
    check_passed_on(rest, _FIXED)
    folder = Path(args.output_dir)
    defining = {name: getattr(args, name) for name in ("count", "acquire_samples", "acquire_layers")}
    cli.claim_folder(folder, {"experiment": "active", "model": args.model_name_or_path, "arguments": rest, **defining})
    for name in args.settings:
        write_pool(ACTIVE[name], args.seeds, Path(args.data_dir), folder / "data" / name)
    rounds = Rounds(args, folder, tuple(rest))
    failed = [] if args.report_only else rounds.complete()
    active_report.write(folder, rounds.results(), rest)
    refuse_failed(failed, len(rounds.runs()))


class Chain(NamedTuple):
    """The rounds that follow one another."""

    setting: str
    arm: str
    seed: int

    @property
    def method(self) -> str:
        """That each of its runs trains with."""
        return self.arm.rpartition("-")[0]

    @property
    def strategy(self) -> str:
        """That rows are chosen by."""
        return self.arm.rpartition("-")[2]


class Rounds:
    """The runs by chain and round, and the rows of each.

    Args:
        rest: Flags that every run gets.
    """

    def __init__(self, args: ActiveArguments, folder: Path, rest: tuple[str, ...]) -> None:
        self.args, self.folder, self.rest = args, folder, rest
        self.chains = [
            Chain(setting, arm, seed) for seed in args.seeds for setting in args.settings for arm in args.arms
        ]

    def complete(self) -> list[GridRun]:
        """Bring every chain to its end; the runs that failed, with which their chains stop."""
        failed: list[GridRun] = []
        for number in range(self.args.rounds + 1):
            ready = [chain for chain in self.chains if self.labelled(chain, number).is_file()]
            runs = {run.folder: run for run in (self.run(chain, number) for chain in ready)}
            failed += complete_runs([run for run in runs.values() if not run.is_complete], "run_glue_blob", self.args)
            if number < self.args.rounds:
                for chain in ready:
                    if self.run(chain, number).is_complete:
                        self.choose(chain, number)
        return failed

    def runs(self) -> set[Path]:
        """The folders of all runs."""
        return {self.run(chain, number).folder for chain in self.chains for number in range(self.args.rounds + 1)}

    def run(self, chain: Chain, number: int) -> GridRun:
        """The run of a round; the first one is of all chains of a method."""
        setting, data = ACTIVE[chain.setting], self.folder / "data" / chain.setting
        task = setting.task
        label = chain.arm if number else chain.method
        name = f"{chain.setting}/{label}/seed{chain.seed}/round{number}"
        flags = [
            "--train_file", str(self.labelled(chain, number)), "--validation_file", str(data / "test.jsonl"),
            "--text_columns", *task.columns, "--max_steps", str(task.steps), "--max_length", str(setting.max_length),
            "--per_device_train_batch_size", str(task.batch_size), "--learning_rate", f"{task.learning_rate:g}",
            "--per_device_eval_batch_size", "50", "--save_strategy", "no", "--report_to", "none",
            "--target_modules", *task.targets, "--model_name_or_path", self.args.model_name_or_path,
            "--method", chain.method, "--seed", str(chain.seed),
        ]  # fmt: skip
        return GridRun(name, self.folder / "runs" / name, (*flags, *self.rest))

    def labelled(self, chain: Chain, number: int) -> Path:
        """The rows that a round is trained on."""
        if number == 0:
            return self.folder / "data" / chain.setting / f"seed{chain.seed}" / "initial.jsonl"
        return self._rows(chain) / f"labelled{number}.jsonl"

    def chosen(self, chain: Chain, number: int) -> Path:
        """The rows that are new in a round, in order of acquisition, with their scores."""
        return self._rows(chain) / f"chosen{number}.jsonl"

    def _rows(self, chain: Chain) -> Path:
        return self.folder / "rows" / chain.setting / chain.arm / f"seed{chain.seed}"

    def choose(self, chain: Chain, number: int) -> None:
        """Choose, by the run of a round, what is new in the next one; what is there already is kept."""
        setting, following = ACTIVE[chain.setting], number + 1
        if not self.chosen(chain, following).is_file():
            pool = read_pool(self.folder / "data" / chain.setting, chain.seed)
            taken = {row["id"] for before in range(1, following) for row in read_rows(self.chosen(chain, before))}
            rows = self._ask(chain, number, [row for row in pool if row["id"] not in taken])
            labels = {row["id"]: row["label"] for row in pool}
            _write(self.chosen(chain, following), [{**row, "label": labels[row["id"]]} for row in rows])
        if not self.labelled(chain, following).is_file():
            before = read_rows(self.labelled(chain, number))
            new = [texts_and_label(row, setting.task) for row in read_rows(self.chosen(chain, following))]
            _write(self.labelled(chain, following), [*before, *new])

    def _ask(self, chain: Chain, number: int, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows that are chosen of these, which are shown without their labels."""
        setting = ACTIVE[chain.setting]
        columns = setting.task.columns
        pool = Pool(Dataset.from_list([{name: row[name] for name in ("id", *columns)} for row in rows]), columns)
        count = self.args.count_of(setting)
        if chain.strategy == RANDOM:
            return rows_by_chance(pool, count, 1000 * chain.seed + number)
        run = self.run(chain, number)
        logger.info("%s: choosing %d of %d rows by %s", run.name, count, len(pool), chain.strategy)
        model = load_networks(run.folder).to(PartialState().device)
        sampling = self.args.sampling(chain.seed)
        return acquire_rows(
            model, pool, chain.strategy, count, sampling, 50, setting.max_length, CANDIDATES, progress=False
        )

    def results(self) -> list[dict[str, Any]]:
        """A row for each complete round of a chain, for `active_report`."""
        found = []
        for chain in self.chains:
            for number in range(self.args.rounds + 1):
                run = self.run(chain, number)
                if run.is_complete and self.labelled(chain, number).is_file():
                    metrics = json.loads((run.folder / "eval_results.json").read_text(encoding="utf-8"))
                    values = {name: metrics[f"eval_{name}"] for name in active_report.METRICS}
                    facts: dict[str, Any] = {"method": chain.method, "strategy": chain.strategy, "round": number}
                    rows = read_rows(self.labelled(chain, number))
                    columns = ACTIVE[chain.setting].task.columns
                    facts |= {"labelled": len(rows), "classes": len({row["label"] for row in rows})}
                    facts["distinct"] = len({tuple(row[name] for name in columns) for row in rows})
                    found.append({**chain._asdict(), **facts, **values})
        return found


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
