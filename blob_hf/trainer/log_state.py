"""log_state.json of a checkpoint: what the log has not shown yet, and the engine that saved it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from blob_hf.utils import files

LOG_STATE = "log_state.json"


@dataclass(frozen=True)
class LogState:
    """Where the log of a training stands.

    Attributes:
        nll_since_last_log: Sum over the steps since then.
        engine: See `engine_of`; None of a checkpoint of an earlier version.
    """

    nll_since_last_log: float
    last_logged_step: int
    engine: str | None = None

    def save(self, folder: Path) -> None:
        """Add it to a checkpoint."""
        files.write_text(folder / LOG_STATE, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: Path, rows: Sequence[Mapping[str, float]] | None = None) -> "LogState | None":
        """That of a checkpoint; None where it has none.

        Args:
            rows: Of the KL's history, if there is one: an earlier version kept NLL + pi_t KL here.
        """
        if not (folder / LOG_STATE).is_file():
            return None
        state = json.loads((folder / LOG_STATE).read_text(encoding="utf-8"))
        last, unlogged = state["last_logged_step"], state.get("nll_since_last_log")
        if unlogged is None and rows is not None:
            unlogged = sum(row["nll"] for row in rows if row["step"] > last)
        unlogged = state["loss_since_last_log"] if unlogged is None else unlogged
        return cls(unlogged, last, state.get("engine"))
