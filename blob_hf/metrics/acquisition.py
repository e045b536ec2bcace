"""What to label next: which rows of a pool would tell most about the network, by what its samples say of them.

Everything is in nats. `random` asks nothing of the model, `entropy` takes what the predictive is least sure of, `bald`
what the networks disagree about most (Houlsby et al., 2011), each row for itself: of two equal rows it takes both.
`batchbald` (Kirsch, van Amersfoort & Gal, NeurIPS 2019) takes rows that together tell most.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr, logsumexp, softmax

from blob_hf.metrics.uncertainty import mutual_information, predictive_entropy
from blob_hf.utils.errors import BlobError

Floats = NDArray[np.float64]

STRATEGIES = ("random", "entropy", "bald", "batchbald")
OF_NETWORKS = ("bald", "batchbald")  # which compare networks: of a single one they are 0 for every row
TOLD = 0.9  # share of log S from which on S networks no longer tell batches apart
OUTCOMES = 1000  # labels of the rows chosen so far that are weighed at most: all there are, or so many drawn
_AT_ONCE = 4_000_000  # numbers in memory
_LEADING = 32  # rows that are compared with the chosen ones together


@dataclass(frozen=True)
class Acquired:
    """Rows in the order of their acquisition.

    Attributes:
        rows: Indices, `(count,)`.
        scores: What each was chosen by, nats, `(count,)`: its entropy or mutual information, of `batchbald` what it
            adds to that of the rows before it (so that they sum to the joint one); of `random` NaN.
        jointly: Of `batchbald`: how many of the first rows that is so for. Of later ones it is the most that each can
            add.
    """

    rows: NDArray[np.int64]
    scores: Floats
    jointly: int = 0


def acquire(
    sample_probabilities: ArrayLike, count: int, strategy: str = "bald", seed: int = 0, outcomes: int = OUTCOMES
) -> Acquired:
    """Choose rows of a pool to label.

    Args:
        sample_probabilities: p(y | x, A_s), `(inputs, samples, classes)`, as `Prediction.sample_probabilities`.
        count: Rows to choose.
        strategy: One of `STRATEGIES`.
        seed: Of `random`, and of the outcomes that `batchbald` draws.
        outcomes: See `batch_bald`.

    Raises:
        BlobError: Unknown strategy, more rows than there are, no probabilities, or a single network where networks
            are compared.
    """
    probabilities = _check(sample_probabilities)
    check_count(count, len(probabilities))
    if strategy == "batchbald":
        return batch_bald(probabilities, count, seed, outcomes)
    if strategy == "random":
        return random_rows(len(probabilities), count, seed)
    return highest(scores(probabilities, strategy), count)


def scores(sample_probabilities: ArrayLike, strategy: str) -> Floats:
    """What `entropy` and `bald` order rows by, nats, `(inputs,)`: each is of its row alone.

    Args:
        sample_probabilities: `(inputs, samples, classes)`.
        strategy: `entropy`: H[mean_s p_s]. `bald`: I(y; A) = H[mean_s p_s] - mean_s H[p_s], the mutual information
            of label and network (Houlsby et al., 2011, eq. (2)); `batchbald` begins with it.

    Raises:
        BlobError: Another strategy, no probabilities, or a single network for BALD.
    """
    if strategy not in STRATEGIES or strategy == "random":
        raise BlobError(f"rows are ordered by entropy or bald, got {strategy!r}")
    probabilities = _check(sample_probabilities)
    if strategy in OF_NETWORKS:
        check_networks(probabilities.shape[1], strategy)
    with np.errstate(divide="ignore"):
        logs = np.log(probabilities)
    return predictive_entropy(logs) if strategy == "entropy" else mutual_information(logs)


def highest(values: ArrayLike, count: int) -> Acquired:
    """The rows of the highest scores, highest first; of equal ones the earlier."""
    found = np.asarray(values, dtype=np.float64)
    rows = np.argsort(-found, kind="stable")[:count]
    return Acquired(rows, found[rows])


def random_rows(total: int, count: int, seed: int) -> Acquired:
    """Rows by chance, none twice."""
    return Acquired(np.random.default_rng(seed).choice(total, count, replace=False), np.full(count, np.nan))


def check_count(count: int, total: int) -> None:
    """Refuse to choose no rows, or more than there are.

    Raises:
        BlobError: As said.
    """
    if not 1 <= count <= total:
        raise BlobError(f"count must be from 1 to the {total} rows of the pool, got {count}")


def check_networks(samples: int, strategy: str) -> None:
    """Refuse to compare fewer than two networks.

    Raises:
        BlobError: There is one.
    """
    if samples < 2:
        raise BlobError(
            f"{strategy} is what two or more networks disagree about, and there is {samples}: a single network has no "
            "mutual information; take entropy, or an adapter with a posterior and more samples"
        )


def _check(sample_probabilities: ArrayLike) -> Floats:
    values = np.asarray(sample_probabilities, dtype=np.float64)
    if values.ndim != 3 or values.size == 0:
        raise BlobError(f"expected sample probabilities (inputs, samples, classes), got shape {values.shape}")
    if not (values >= 0).all() or not (np.abs(values.sum(axis=-1) - 1) < 1e-3).all():
        raise BlobError("rows must be probabilities: at least 0, with a sum of 1; apply softmax")
    return values


# ----- BatchBALD -------------------------------------------------------------------------------------------------


def batch_bald(sample_probabilities: ArrayLike, count: int, seed: int = 0, outcomes: int = OUTCOMES) -> Acquired:
    """Rows that together tell most about the network: greedily, max I(y_1, ..., y_n; A).

    BatchBALD (Kirsch et al., NeurIPS 2019), within (1 - 1/e) of the best batch, as the joint information is
    submodular. By the chain rule a row adds the mean of I(y; A | outcome) over the labels (the outcome) that the rows
    before it may have: its BALD score under the networks' posterior after that outcome. Therefore

    - while there are at most `outcomes` outcomes all are weighed, and the gains are exact for these networks; then as
      many are drawn, equally many from each network, and the gains are unbiased estimates. (The paper weights joint
      probabilities of drawn outcomes instead; ours needs no ratio of tiny numbers, and is never negative.)
    - a row adds no more than it did before: only rows that still could be the best are weighed again (Minoux, 1978).

    S networks can be told apart by log S nats and no more. When the chosen rows tell `TOLD` of that, what further ones
    add says more about S than about them. From there on the row is taken that adds most to whichever chosen one leaves
    it least: max over x of min over chosen j of I(y_x; A | y_j), which is no less than what it adds to all of them
    together (conditional mutual information maximisation; Fleuret, JMLR 5, 2004, for features of a classifier).

    Args:
        sample_probabilities: `(inputs, samples, classes)`.
        count: Rows to choose.
        seed: Of the outcomes that are drawn.
        outcomes: Labels of the chosen rows that are weighed at most; more take longer and estimate better.

    Raises:
        BlobError: No probabilities, a single network, more rows than there are, or fewer outcomes than networks.
    """
    probabilities = _check(sample_probabilities)
    check_networks(probabilities.shape[1], "batchbald")
    check_count(count, len(probabilities))
    known = _Outcomes(probabilities.shape[1], outcomes, seed)
    pairs = _Pairs(probabilities)
    bounds = pairs.most.copy()
    rows: list[int] = []
    gains: list[float] = []
    while len(rows) < count and sum(gains) < TOLD * np.log(probabilities.shape[1]):
        best = _best(probabilities, bounds, known) if rows else int(bounds.argmax())
        rows.append(best)
        gains.append(float(bounds[best]))
        bounds[best] = -np.inf
        known.add(probabilities[best])
    jointly = len(rows)
    while len(rows) < count:
        best = pairs.best(rows)
        rows.append(best)
        gains.append(float(pairs.most[best]))
    return Acquired(np.array(rows), np.array(gains), jointly)


def _best(probabilities: Floats, bounds: Floats, known: "_Outcomes") -> int:
    """The row that adds most; what rows add replaces their bounds as far as it had to be found out."""
    order = np.argsort(-bounds, kind="stable")
    order = order[: int(np.isfinite(bounds).sum())]  # without those that are chosen
    best = -1
    for part in _parts(order, known.block(probabilities.shape[-1])):
        if best >= 0 and bounds[best] >= bounds[part[0]]:
            break
        bounds[part] = known.gains(probabilities[part])
        leading = int(part[bounds[part].argmax()])
        if best < 0 or bounds[leading] > bounds[best]:
            best = leading
    return best


def _parts(order: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


class _Pairs:
    """What rows add to the chosen one that leaves them least.

    Attributes:
        most: The least of what each row adds to one of the chosen rows that it was compared with, nats, `(inputs,)`;
            its BALD score before.
    """

    def __init__(self, probabilities: Floats) -> None:
        self.probabilities = probabilities
        self.most = scores(probabilities, "bald")
        self._compared = np.zeros(len(probabilities), dtype=np.int64)  # with so many of the chosen
        self._after: list[_Outcomes] = []

    def best(self, chosen: Sequence[int]) -> int:
        """The row that adds most; only rows that still could be it are compared with what was chosen since."""
        for row in chosen[len(self._after) :]:
            _, samples, classes = self.probabilities.shape
            after = _Outcomes(samples, max(samples, classes), seed=0)
            after.add(self.probabilities[row])
            self._after.append(after)
        open_rows = np.setdiff1d(np.arange(len(self.most)), chosen)
        while True:
            order = open_rows[np.argsort(-self.most[open_rows], kind="stable")[:_LEADING]]
            if self._compared[order[0]] == len(chosen):
                return int(order[0])
            for place, after in enumerate(self._after):
                behind = order[self._compared[order] <= place]
                if len(behind):
                    added = after.gains(self.probabilities[behind])
                    self.most[behind] = np.minimum(self.most[behind], added)
            self._compared[order] = len(chosen)


def joint_information(sample_probabilities: ArrayLike, outcomes: int = OUTCOMES, seed: int = 0) -> float:
    """I(y_1, ..., y_n; A) of the labels of n rows, nats: exact while they have at most `outcomes` outcomes.

    Args:
        sample_probabilities: Of these rows, `(n, samples, classes)`.
        outcomes, seed: As of `batch_bald`.
    """
    probabilities = _check(sample_probabilities)
    known, total = _Outcomes(probabilities.shape[1], outcomes, seed), 0.0
    for row in probabilities:
        total += float(known.gains(row[None])[0])
        known.add(row)
    return total


class _Outcomes:
    """The labels that some rows may have, and how likely each network is after each of these outcomes.

    Args:
        samples: S, networks.
        most: Outcomes that are kept at most.
        seed: Of those that are drawn where there are more.

    Raises:
        BlobError: Fewer outcomes than networks.
    """

    def __init__(self, samples: int, most: int, seed: int) -> None:
        if most < samples:
            raise BlobError(f"outcomes must be at least the number of networks, {samples}, got {most}")
        self.most = most
        self.rng = np.random.default_rng(seed)
        self.log_likelihoods = np.zeros((1, samples))  # of each outcome under each network
        self.networks: NDArray[np.int64] | None = None  # that each outcome was drawn from, once they are

    @property
    def weights(self) -> Floats:
        """Of the outcomes, `(outcomes,)`, with the sum 1."""
        count, samples = self.log_likelihoods.shape
        if self.networks is not None:
            return np.full(count, 1 / count)
        return np.exp(logsumexp(self.log_likelihoods, axis=1) - np.log(samples))

    def block(self, classes: int) -> int:
        """Rows whose gains are found together, within memory."""
        return max(1, _AT_ONCE // (len(self.log_likelihoods) * classes))

    def gains(self, probabilities: Floats) -> Floats:
        """What each of some rows, `(rows, samples, classes)`, adds to the joint information, nats, `(rows,)`."""
        rows, samples, classes = probabilities.shape
        posterior = softmax(self.log_likelihoods, axis=1)
        predictive = posterior @ probabilities.transpose(1, 0, 2).reshape(samples, rows * classes)
        total = entr(predictive).reshape(-1, rows, classes).sum(axis=-1)
        expected = posterior @ entr(probabilities).sum(axis=-1).T
        return np.maximum(self.weights @ (total - expected), 0.0)

    def add(self, probabilities: Floats) -> None:
        """Go on with the labels of one more row, `(samples, classes)`."""
        count, samples = self.log_likelihoods.shape
        classes = probabilities.shape[-1]
        logs = np.log(np.maximum(probabilities, np.finfo(float).tiny))
        if self.networks is None and count * classes <= self.most:
            self.log_likelihoods = (self.log_likelihoods[:, None] + logs.T).reshape(-1, samples)
            # what no network can mean is no outcome
            self.log_likelihoods = self.log_likelihoods[self.weights > np.finfo(float).tiny]
            return
        if self.networks is None:
            self._draw()
        labels = self._labels(probabilities)
        self.log_likelihoods = self.log_likelihoods + logs[:, labels].T

    def _draw(self) -> None:
        """From here on as many outcomes as may be kept, each network's in proportion to their likelihoods."""
        samples = self.log_likelihoods.shape[1]
        each = self.most // samples
        shares = softmax(self.log_likelihoods, axis=0).T
        drawn = np.concatenate([self.rng.choice(len(share), each, p=share) for share in shares])
        self.log_likelihoods, self.networks = self.log_likelihoods[drawn], np.repeat(np.arange(samples), each)

    def _labels(self, probabilities: Floats) -> NDArray[np.int64]:
        """A label for each outcome, from the network that it was drawn from."""
        cumulative = probabilities.cumsum(axis=-1)[self.networks]
        uniform = self.rng.random((len(cumulative), 1)) * cumulative[:, -1:]
        return np.minimum((uniform >= cumulative).sum(axis=-1), probabilities.shape[-1] - 1)
