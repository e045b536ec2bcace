"""Intervals, paired tests and the decomposition of spread, over dialogues: they are what a result generalises to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def mean_interval(values: ArrayLike, seed: int = 0) -> Interval:
    """Mean over dialogues with its percentile bootstrap interval (scipy)."""
    data = np.asarray(values, dtype=float)
    if len(data) < 2 or np.ptp(data) == 0:
        return Interval(float(data.mean()), float(data.mean()), float(data.mean()))
    found = stats.bootstrap(
        (data,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Interval(float(data.mean()), float(found.low), float(found.high))


@dataclass(frozen=True)
class Comparison:
    """A paired comparison: mean difference with its bootstrap interval, and the p-value of the paired t-test."""

    difference: Interval
    p_value: float

    def __str__(self) -> str:
        return f"{self.difference}, paired t-test p = {self.p_value:.3g}"

    @property
    def verdict(self) -> str:
        """ "higher", "lower", or "not shown to differ" where the interval contains 0."""
        if self.difference.low > 0:
            return "higher"
        return "lower" if self.difference.high < 0 else "not shown to differ"


def compare(first: ArrayLike, second: ArrayLike, seed: int = 0) -> Comparison:
    """Compare two methods on the same dialogues: `first` - `second`."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    differences = np.where(np.isclose(a, b, rtol=0, atol=1e-12), 0.0, a - b)  # means of equal scores differ by rounding
    same = len(a) < 2 or np.ptp(differences) == 0
    p_value = float("nan") if same else float(stats.ttest_rel(a, b).pvalue)
    return Comparison(mean_interval(differences, seed), p_value)


# ----- where the spread of scores comes from ---------------------------------------------------------------------


def within_variance(scores: pd.Series, dialogues: pd.Series) -> NDArray[np.float64]:
    """Variance of the scores of each dialogue's samples, `(dialogues,)`, unbiased; 0 for a single text."""
    return np.asarray(scores.groupby(dialogues, sort=False).var(ddof=1).fillna(0.0), dtype=np.float64)


def between_variance(scores: pd.Series, dialogues: pd.Series) -> float:
    """Variance of the dialogues' true means: that of their sample means, less what sampling adds to it."""
    groups = scores.groupby(dialogues, sort=False)
    noise = (groups.var(ddof=1).fillna(0.0) / groups.size()).mean()
    return max(0.0, float(groups.mean().var(ddof=1) - noise)) if groups.ngroups > 1 else 0.0


def decompose(table: pd.DataFrame, column: str, seed: int = 0) -> pd.DataFrame | None:
    """Variance of a score by source, from the cross {mean, sample} x {greedy, sampling} of BLoB.

    weights: between posterior samples that decode greedily. decoding: between token samples of the posterior mean.
    both: when both vary; interaction is what `both` has beyond their sum. dialogues: between the dialogues' means where
    both vary.

    Returns:
        Rows by source with variance, its 95 % bootstrap interval over dialogues and its share of the total (dialogues +
        both); None if an arm is missing.
    """
    arms = {"weights": "blob-sample-greedy", "decoding": "blob-mean-sampling", "both": "blob-sample-sampling"}
    parts = {source: table[table["arm"] == arm] for source, arm in arms.items()}
    if any(part.empty for part in parts.values()):
        return None
    within = {source: within_variance(part[column], part["dialogue"]) for source, part in parts.items()}
    within["interaction"] = within["both"] - within["weights"] - within["decoding"]
    rows = {source: mean_interval(values, seed) for source, values in within.items()}
    joint = parts["both"]
    total = between_variance(joint[column], joint["dialogue"]) + rows["both"].value
    dialogues = total - rows["both"].value
    result = pd.DataFrame(
        [{"source": source, "variance": row.value, "low": row.low, "high": row.high} for source, row in rows.items()]
        + [{"source": "dialogues", "variance": dialogues, "low": np.nan, "high": np.nan}]
    ).set_index("source")
    result["share"] = result["variance"] / total if total > 0 else np.nan
    return result


# ----- what more samples buy --------------------------------------------------------------------------------------


def best_of(scores: ArrayLike, size: int) -> float:
    """Expected maximum of `size` scores drawn without replacement from a dialogue's samples: exact, no simulation."""
    ordered = np.sort(np.asarray(scores, dtype=float))
    total = len(ordered)
    ranks = np.arange(1, total + 1)
    # P(the maximum is the k-th smallest) = C(k-1, size-1) / C(total, size)
    weights = stats.hypergeom.pmf(size - 1, total - 1, ranks - 1, size - 1) * size / total
    return float((weights * ordered).sum())


def sizes_up_to(count: int) -> list[int]:
    """1, 2, 4, ... and the count itself."""
    sizes = [2**k for k in range(count.bit_length()) if 2**k < count]
    return [*sizes, count]


# ----- over seeds -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Mean and sample std (ddof = 1) over seeds; the std of one seed is NaN."""

    mean: float
    std: float
    count: int

    def show(self, scale: float = 1.0, digits: int = 2) -> str:
        """`mean +- std`, without a std when there is one seed."""
        std = "" if np.isnan(self.std) else f" +- {scale * self.std:.{digits}f}"
        return f"{scale * self.mean:.{digits}f}{std}"

    def distance(self, other: "Spread") -> float:
        """self - other in units of their joint std, sqrt(std^2 + other.std^2); unknown stds count as 0."""
        joint = np.sqrt(np.nan_to_num(self.std) ** 2 + np.nan_to_num(other.std) ** 2)
        return float((self.mean - other.mean) / joint) if joint > 0 else float("nan")


def spread(values: ArrayLike) -> Spread:
    """Mean +- std over seeds."""
    data = np.asarray(values, dtype=float)
    return Spread(float(data.mean()), float(data.std(ddof=1)) if len(data) > 1 else float("nan"), len(data))


def paired_interval(first: ArrayLike, second: ArrayLike) -> Interval:
    """Mean over seeds of `first` - `second` with its 95 % t-interval; it is infinite for one seed."""
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    mean = float(differences.mean())
    if len(differences) < 2:
        return Interval(mean, -np.inf, np.inf)
    half = float(stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences)))
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class PairedTest:
    """A paired comparison over seeds: the mean difference with its 95 % t-interval, and the t-test's p-value."""

    interval: Interval
    p_value: float


def paired_test(first: ArrayLike, second: ArrayLike) -> PairedTest:
    """Compare two methods on the same seeds, two or more: `first` - `second`; p is 1 where all are equal."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    p_value = 1.0 if np.ptp(a - b) == 0 and a[0] == b[0] else float(stats.ttest_rel(a, b).pvalue)
    return PairedTest(paired_interval(a, b), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down correction: adjusted p-values that hold the family-wise error, in the given order."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted.tolist()


@dataclass(frozen=True)
class Ranks:
    """Mean ranks of methods over blocks (here settings); 1 is best.

    Attributes:
        ranks: By method.
        critical_difference: Two methods whose mean ranks differ by more are told apart at 5 % (Nemenyi).
        p_value: Friedman's test that all methods are alike; NaN for fewer than three.
    """

    ranks: dict[str, float]
    critical_difference: float
    p_value: float


def mean_ranks(table: pd.DataFrame, more_is_better: bool) -> Ranks:
    """Ranks of methods (columns) in each block (row), averaged (Demsar, JMLR 2006)."""
    ranks = table.rank(axis="columns", ascending=not more_is_better).mean()
    p_value = float(stats.friedmanchisquare(*table.to_numpy().T).pvalue) if table.shape[1] > 2 else float("nan")
    return Ranks(
        {str(name): float(rank) for name, rank in ranks.items()}, critical_difference(*reversed(table.shape)), p_value
    )


def critical_difference(methods: int, blocks: int, level: float = 0.05) -> float:
    """Nemenyi's critical difference of mean ranks, q sqrt(k (k + 1) / (6 N)); q: studentised range / sqrt 2."""
    q = stats.studentized_range.ppf(1 - level, methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(methods * (methods + 1) / (6 * blocks)))
