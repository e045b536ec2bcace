"""The settings of active learning: a task, its pool, and how many rows are labelled at first and in each round.

Every seed draws rows and a pool of its own; the test rows are the same for all. As in the study only short texts are
taken, and the number of steps is the same in every round, so that a round is short on a CPU, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blob_hf.experiments.study_settings import Setting, count_words, fitting, read_rows, shuffled, write_once
from blob_hf.utils.errors import BlobError

TEST_ROWS = 300


@dataclass(frozen=True)
class ActiveSetting:
    """A task to label rows of.

    Attributes:
        task: Its files, columns and training; `rows` is the size of the pool.
        initial: Rows that are labelled at first: one of each class, the others by chance.
        count: Rows that are labelled in a round.
        max_length: Of the texts, in tokens.
        copies: How often each row of the pool is there: what a pool of near-duplicates is like (Kirsch et al., 2019,
            repeat MNIST's digits to this end).
        test_rows: Rows that every round is measured by.
    """

    task: Setting
    initial: int
    count: int
    max_length: int = 64
    copies: int = 1
    test_rows: int = TEST_ROWS


def _intents(name: str, file: str, **changes: Any) -> Setting:
    train, test = (f"intent/{file}/{split}.jsonl" for split in ("train", "test"))
    changes = {"rows": 500, "steps": 160, "learning_rate": 5e-3, "targets": ("query", "value"), **changes}
    return Setting(name, True, train, test, held_out=0, columns=("text",), **changes)


_MRPC = Setting(
    "mrpc", True, train="glue/mrpc/train.jsonl", test="glue/mrpc/validation.jsonl", rows=200, held_out=0, steps=80,
    learning_rate=2e-3, max_words=40, columns=("sentence1", "sentence2"), targets=("query", "value"),
)  # fmt: skip

ACTIVE = {
    setting.task.name: setting
    for setting in (
        ActiveSetting(_intents("banking77", "banking77", max_words=12), initial=77, count=40),
        ActiveSetting(_intents("clinc150", "clinc150", max_words=10), initial=150, count=50),
        ActiveSetting(_MRPC, initial=32, count=16, max_length=96, test_rows=200),
        ActiveSetting(
            _intents("banking77-copies", "banking77", max_words=12, rows=200), initial=77, count=40, copies=3
        ),
    )
}
DEFAULT = ("banking77", "clinc150", "mrpc")


def write_pool(setting: ActiveSetting, seeds: Sequence[int], data_dir: Path, folder: Path) -> None:
    """Draw the rows of a setting into `folder`: test.jsonl, seed{n}/initial.jsonl and seed{n}/pool.jsonl.

    The rows of a pool have an `id` beside their texts and the label that they get when they are chosen. What is there
    already is left as it is.

    Raises:
        BlobError: A file is missing, or has too few rows.
    """
    task = setting.task
    rows = shuffled(fitting(task, data_dir / task.train), f"{task.name}/pool")
    test = shuffled(fitting(task, data_dir / task.test), f"{task.name}/test")[: setting.test_rows]
    spare = setting.test_rows - len(test)  # filled up with training rows, which are then in no pool
    test, rows = test + rows[:spare], rows[spare:]
    classes = {row["label"] for row in rows}
    if setting.initial < len(classes) or len(rows) < setting.initial + task.rows:
        raise BlobError(
            f"{task.train} has {len(rows)} short rows of {len(classes)} classes: {task.name} takes {setting.initial} "
            f"at first and a pool of {task.rows}"
        )
    write_once(folder / "test.jsonl", sorted(test, key=lambda row: count_words(row, task)))  # like lengths together
    for seed in seeds:
        drawn = _one_of_each_first(shuffled(rows, f"{task.name}/{seed}"))
        pool = drawn[setting.initial :][: task.rows] * setting.copies
        pool = shuffled(pool, f"{task.name}/{seed}/copies") if setting.copies > 1 else pool
        own = folder / f"seed{seed}"
        write_once(own / "initial.jsonl", [texts_and_label(row, task) for row in drawn[: setting.initial]])
        write_once(own / "pool.jsonl", [{"id": n, **texts_and_label(row, task)} for n, row in enumerate(pool)])


def texts_and_label(row: dict[str, Any], task: Setting) -> dict[str, Any]:
    """What is trained on of a row."""
    return {name: row[name] for name in (*task.columns, "label")}


def read_pool(folder: Path, seed: int) -> list[dict[str, Any]]:
    """The pool of a seed, its rows in the order of their `id`."""
    return read_rows(folder / f"seed{seed}" / "pool.jsonl")


def _one_of_each_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    seen: set[Any] = set()
    first: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for row in rows:
        (rest if row["label"] in seen else first).append(row)
        seen.add(row["label"])
    return first + rest
