"""kl_history.csv: NLL, KL, its weight, the posterior std and the learning rate's shape at every optimizer step."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from blob_hf.utils import files

COLUMNS = ("step", "nll", "kl", "kl_weight", "kl_loss", "elbo", "posterior_std", "lr_scale")
LOGGED = COLUMNS[1:-1]  # what the Trainer's log does not have by itself
FILE_NAME = "kl_history.csv"


class KLHistory:
    """Collects one row per optimizer step without waiting for the device; numbers are read when it is drained.

    Columns: step; nll (mean per example or token of the step's whole batch, nats); kl (nats); kl_weight (pi_t);
    kl_loss (pi_t * kl); elbo (nll + kl, the negative ELBO as the published tables print it); posterior_std (mean
    of Omega over all weights); lr_scale (lr_t / lr_0, which the decoupled KL step follows).
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.last_logged = 0  # step
        self._pending: dict[int, tuple[Tensor, Tensor, float, Tensor, float]] = {}

    def add(self, step: int, nll: Tensor, kl: Tensor, weight: float, std: Tensor, lr_scale: float = 1.0) -> None:
        """Add the share of one micro-batch: its NLL counts towards the step, the rest is the same for all of them."""
        before = self._pending[step][0] if step in self._pending else 0.0
        self._pending[step] = (before + nll.detach(), kl.detach(), weight, std.detach(), lr_scale)

    def has(self, step: int) -> bool:
        """Whether something was added for a step since the last drain."""
        return step in self._pending

    def drain(self, average: Callable[[Tensor], Tensor]) -> list[dict[str, float]]:
        """Read the rows added since the last call; `average` takes the mean of the NLLs over processes."""
        if not self._pending:
            return []
        nlls = average(torch.stack([row[0] for row in self._pending.values()])).tolist()
        kls = torch.stack([row[1] for row in self._pending.values()]).tolist()
        stds = torch.stack([row[3] for row in self._pending.values()]).tolist()
        fixed = [(row[2], row[4]) for row in self._pending.values()]
        new = [
            dict(zip(COLUMNS, (step, nll, kl, weight, weight * kl, nll + kl, std, lr_scale), strict=True))
            for step, nll, kl, (weight, lr_scale), std in zip(self._pending, nlls, kls, fixed, stds, strict=True)
        ]
        self._pending.clear()
        self.rows += new
        return new

    def unlogged(self) -> list[dict[str, float]]:
        """The drained rows since the last call."""
        rows = [row for row in self.rows if row["step"] > self.last_logged]
        if rows:
            self.last_logged = int(rows[-1]["step"])
        return rows

    def load(self, path: Path) -> None:
        """Take over the rows of an interrupted run, as its checkpoint has them."""
        if path.is_file():
            kept = pd.read_csv(path, dtype=str).to_dict("records")  # float() is exact, read_csv's parser need not be
            self.rows = [{str(name): float(value) for name, value in row.items()} for row in kept]

    def save(self, path: Path) -> None:
        """Write the CSV, whole or not at all."""
        files.write_text(path, pd.DataFrame(self.rows, columns=list(COLUMNS)).astype({"step": int}).to_csv(index=False))
