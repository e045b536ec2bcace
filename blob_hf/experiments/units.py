"""Rows on disk: one file per unit of work, written whole or not at all, so that a killed run goes on where it was.

A unit's texts depend on its own key alone (see `arms.py`), so it does not matter which process makes it, or when.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

Key = tuple[str, int]  # arm, index of its (first) dialogue
Row = dict[str, Any]  # dialogue, arm, sample, text


def unit_file(folder: Path, key: Key) -> Path:
    """Where a unit is: JSON lines."""
    arm, index = key
    return folder / "units" / arm / f"{index:05d}.jsonl"


def complete(folder: Path, keys: Sequence[Key], make: Callable[[Key], list[Row]]) -> None:
    """Make the units that are not there yet, each process its share, with a progress bar that estimates the rest.

    Args:
        make: The rows of a unit.
    """
    state = PartialState()
    todo = [key for key in keys if not unit_file(folder, key).is_file()]
    state.wait_for_everyone()  # all have looked before anyone writes
    mine = todo[state.process_index :: state.num_processes]
    for key in tqdm(mine, desc="summaries", unit="unit", disable=not state.is_main_process):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in make(key))
        files.write_text(unit_file(folder, key), "".join(lines))
    state.wait_for_everyone()


def read(folder: Path, keys: Sequence[Key]) -> Iterator[Row]:
    """All rows of the units, in the order of the keys.

    Raises:
        BlobError: A unit is damaged.
    """
    for key in keys:
        file = unit_file(folder, key)
        try:
            yield from (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        except ValueError as error:
            raise BlobError(
                f"{file} is damaged; delete it and start the experiment again, it will be redone"
            ) from error
