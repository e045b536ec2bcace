"""What a student lost of its teacher: the scores of both, and the share of the samples' gain that it keeps."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

GAINS = ("nll", "ece")  # lower is better


@dataclass(frozen=True)
class Comparison:
    """Scores on labelled rows.

    Attributes:
        predictive, mean, student: Of the teacher's N samples, of its posterior mean, and of the student, by metric.
        num_samples: N.
        rows: How many.
        seconds: That each took, by the same names.
    """

    predictive: Mapping[str, float]
    mean: Mapping[str, float]
    student: Mapping[str, float]
    num_samples: int
    rows: int
    seconds: Mapping[str, float]

    def kept(self, metric: str) -> float:
        """(N=0 - student) / (N=0 - N=S): 1 keeps all that the samples gain, 0 nothing; NaN where they gain nothing."""
        gain = self.mean[metric] - self.predictive[metric]
        return (self.mean[metric] - self.student[metric]) / gain if gain > 0 else float("nan")

    def gains(self) -> dict[str, float]:
        """`kept` by metric, of those that the samples may improve."""
        return {metric: self.kept(metric) for metric in GAINS if metric in self.mean}

    def table(self) -> pd.DataFrame:
        """Metrics as rows; a last column says what is kept."""
        columns = {
            f"teacher, N={self.num_samples}": self.predictive,
            "teacher, N=0": self.mean,
            "student": self.student,
        }
        table = pd.DataFrame({name: pd.Series(dict(values)) for name, values in columns.items()})
        table["kept of the gain"] = pd.Series(self.gains()).reindex(table.index)
        return table

    def sentence(self) -> str:
        """In plain words."""
        kept, nothing = [], []
        for metric, share in self.gains().items():
            name = metric.upper()
            if np.isnan(share):
                scores = (self.predictive[metric], self.mean[metric], self.student[metric])
                shown = "N={} {:.4f}, N=0 {:.4f}, student {:.4f}".format(self.num_samples, *scores)
                nothing.append(f"The samples gain nothing in {name} there ({shown}).")
            else:
                kept.append(f"{100 * share:.0f} % of what {self.num_samples} samples gain in {name}")
        first = f"On {self.rows} labelled rows the student "
        first += f"keeps {' and '.join(kept)}, at one forward." if kept else "was compared with its teacher."
        return " ".join([first, *nothing])

    def facts(self) -> dict[str, object]:
        """For JSON."""
        return {
            "rows": self.rows, "teacher": dict(self.predictive), "teacher_mean": dict(self.mean),
            "student": dict(self.student), "kept": {k: None if np.isnan(v) else v for k, v in self.gains().items()},
            "seconds": dict(self.seconds),
        }  # fmt: skip
