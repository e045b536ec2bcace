"""The `adaptive` schedule: a weight pi_t that grows as the training NLL falls.

A pull that is right where a network memorises its rows is too strong where it still learns from them, and the training
NLL says which of the two it is. Where it stays high the KL keeps out of the way; where it falls far below what the
task can be known to, the KL holds it up.
"""

import math
from collections.abc import Mapping, Sequence

AT_NLL = 0.4  # nats: here the pull is `kl_pull`
PER_FACTOR = 0.2  # nats: so much less and the pull is e times as large; at 0 it is 7 times `kl_pull`
MEMORY = 0.9  # of the running mean of the NLL: some 10 steps


class AdaptiveSchedule:
    """pi_t = exp((AT_NLL - nll) / PER_FACTOR) / M, where nll is a running mean over the optimizer steps before t.

    A function of the NLLs that the history holds, which are means over the whole batch and all processes: every
    process gets the same weight, and a resumed run goes on exactly.

    Args:
        cycle_steps: M: the weight at AT_NLL is that of `uniform`.
        total_steps: Optimizer steps of the run.
    """

    name = "adaptive"

    def __init__(self, cycle_steps: int, total_steps: int) -> None:
        self.cycle_steps, self.total_steps = cycle_steps, total_steps
        self.nll: float | None = None
        self._observed = 0

    def __call__(self, step: int) -> float:
        """The weight now."""
        return self.strength / self.cycle_steps

    @property
    def strength(self) -> float:
        """The pull now, in units of `kl_pull`; 0 in the first step, before any NLL is known."""
        return 0.0 if self.nll is None else math.exp((AT_NLL - self.nll) / PER_FACTOR)

    def observe(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Take in the NLLs of the steps that have been finished since the last call.

        Args:
            rows: Of `KLHistory`, all of the run.
        """
        for row in rows[self._observed :]:
            self.nll = row["nll"] if self.nll is None else MEMORY * self.nll + (1 - MEMORY) * row["nll"]
        self._observed = len(rows)
