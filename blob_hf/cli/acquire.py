"""What to label next: `blob acquire ADAPTER --pool FILE --count 50 --output FILE` writes what would teach most.

The pool has texts, pairs or questions, and needs no labels. It may be long: only scores are kept of it, and for
batchbald the probabilities of its best candidates. Label the rows, add them to the training file, train, ask again.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from blob_hf.cli.adapters import load_networks
from blob_hf.cli.commands import add_asking, add_columns, add_layers, command_parser, processes
from blob_hf.cli.limits import check_numbers
from blob_hf.cli.pool import Pool
from blob_hf.cli.row_files import Row, RowFile
from blob_hf.cli.terminal import setup_logging, user_errors
from blob_hf.data.loading import FORMATS
from blob_hf.inference.answers import Prediction
from blob_hf.metrics.acquisition import (
    OF_NETWORKS,
    STRATEGIES,
    Acquired,
    batch_bald,
    check_count,
    check_networks,
    highest,
    random_rows,
)
from blob_hf.tuner.adapter_files import resolve
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import sampling_of
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

NUM_SAMPLES, CANDIDATES = 20, 1000
RANK, SCORE, ENTROPY, EPISTEMIC = "acquired", "acquisition_score", "entropy", "epistemic"
_BATCHES = 16  # that are predicted together: rows of similar length among them share a batch


class Shortlist:
    """Rows that may yet be chosen: as many of the highest scores as asked for, of equal ones the earlier.

    Args:
        most: Rows that are kept.
        with_probabilities: Whether those of their samples are, too.
    """

    def __init__(self, most: int, with_probabilities: bool) -> None:
        self.most, self.with_probabilities = most, with_probabilities
        self.rows = np.empty(0, dtype=np.int64)
        self.scores = np.empty(0)
        self.facts = np.empty((0, 2))  # entropy and mutual information
        self.probabilities: NDArray[np.float64] | None = None
        self.best_left_out = -np.inf

    def add(self, first: int, found: Prediction, scores: NDArray[np.float64]) -> None:
        """Consider the rows from `first` on."""
        rows = np.concatenate([self.rows, np.arange(first, first + len(found))])
        values = np.concatenate([self.scores, scores])
        facts = np.concatenate([self.facts, np.stack([found.entropy, found.epistemic], axis=1)])
        order = np.argsort(-values, kind="stable")
        kept = order[: self.most]
        if len(order) > self.most:
            self.best_left_out = max(self.best_left_out, float(values[order[self.most]]))
        if self.with_probabilities:
            own = found.sample_probabilities
            both = own if self.probabilities is None else np.concatenate([self.probabilities, own])
            self.probabilities = both[kept]
        self.rows, self.scores, self.facts = rows[kept], values[kept], facts[kept]


def acquire_rows(
    model: BlobModel,
    pool: Pool,
    strategy: str,
    count: int,
    sampling: Sampling,
    batch_size: int = 32,
    max_length: int | None = None,
    candidates: int = CANDIDATES,
    progress: bool = True,
) -> list[Row]:
    """Choose rows of a pool.

    Args:
        model: A classifier or one that answers multiple choice, where it is to work.
        strategy: One of `blob_hf.metrics.acquisition.STRATEGIES` but `random`.
        count: Rows to choose.
        sampling: The networks that are asked; its seed also names what is drawn by chance.
        batch_size: Rows together.
        max_length: Longest input in tokens; default what the model takes.
        candidates: batchbald: rows of the highest BALD scores that are weighed together.

    Returns:
        The rows in order of acquisition, with their rank, score, entropy and (of two or more networks) mutual
        information, nats.

    Raises:
        BlobError: More rows than the pool has, or a strategy that compares networks where there is one.
    """
    check_count(count, len(pool))
    drawn = sampling_of(model, sampling)
    compares = strategy in OF_NETWORKS
    if compares and sampling.num_samples > 1 and drawn.num_samples < 2:
        raise BlobError(
            f"strategy {strategy} needs networks that can disagree, and this adapter is a point: labels and weights "
            "have no mutual information; take entropy, or give it a posterior (method blob, or blob tfb)"
        )
    if compares:
        check_networks(drawn.num_samples, strategy)
    joint = strategy == "batchbald"
    kept = Shortlist(max(count, candidates) if joint else count, joint)
    size = batch_size * _BATCHES
    with tqdm(total=len(pool), desc="pool", unit="row", disable=None if progress else True) as bar:
        for start in range(0, len(pool), size):
            inputs = pool.inputs(start, start + size)
            found = model.predict(inputs, sampling=sampling, batch_size=batch_size, max_length=max_length)
            assert isinstance(found, Prediction)
            kept.add(start, found, found.epistemic if compares else found.entropy)
            bar.update(len(inputs))
    chosen = _together(kept, count, drawn) if joint else highest(kept.scores, count)
    facts = kept.facts[chosen.rows][:, : 2 if drawn.num_samples > 1 else 1]
    return _with_facts(pool, Acquired(kept.rows[chosen.rows], chosen.scores), facts)


def rows_by_chance(pool: Pool, count: int, seed: int) -> list[Row]:
    """The same without a model: the strategy `random`.

    Raises:
        BlobError: More rows than the pool has.
    """
    check_count(count, len(pool))
    return _with_facts(pool, random_rows(len(pool), count, seed), None)


def _together(kept: Shortlist, count: int, drawn: Sampling) -> Acquired:
    """BatchBALD among the candidates, and what is to be known of it."""
    assert kept.probabilities is not None
    chosen = batch_bald(kept.probabilities, count, drawn.seed)
    if chosen.jointly < count:
        logger.info(
            "the first %d rows tell %.2f of the %.2f nats that %d networks can be told apart by; the others were "
            "weighed against each of the chosen rows, not against all: more samples weigh more together",
            chosen.jointly, chosen.scores[: chosen.jointly].sum(), np.log(drawn.num_samples), drawn.num_samples,
        )  # fmt: skip
    unsure = np.flatnonzero(chosen.scores < kept.best_left_out)  # a row adds at most its own BALD score
    if len(unsure):
        logger.info(
            "from row %d on, rows beyond the %d candidates might have added more; more candidates take longer",
            unsure[0] + 1, kept.most,
        )  # fmt: skip
    return chosen


def _with_facts(pool: Pool, chosen: Acquired, facts: NDArray[np.float64] | None) -> list[Row]:
    rows = []
    for place, (index, score) in enumerate(zip(chosen.rows, chosen.scores, strict=True)):
        own: Row = {RANK: place + 1, SCORE: None if np.isnan(score) else _to_six_digits(score)}
        if facts is not None:
            named = zip((ENTROPY, EPISTEMIC), facts[place], strict=False)
            own |= {name: _to_six_digits(value) for name, value in named}
        rows.append({**pool.row(int(index)), **own})
    return rows


def _to_six_digits(value: float) -> float:
    """To six digits: further ones are float32's noise; not to the sixth decimal, as small scores order rows, too."""
    return float(f"{value:.6g}")


# ----- the command -----------------------------------------------------------------------------------------------


def acquire_file(args: argparse.Namespace) -> int:
    """Write the chosen rows of a file, all or none.

    Returns:
        How many.

    Raises:
        BlobError: The adapter or the pool cannot be read or do not fit each other, or the output is there already.
    """
    check_numbers(args)
    state = processes()
    if state.num_processes > 1:
        raise BlobError("start blob acquire as one process")
    sampling = Sampling(args.num_samples, args.seed, batch_size=args.posterior_batch_size, layers=args.layers)
    if args.candidates < 1:
        raise BlobError(f"--candidates must be >= 1, got {args.candidates}")
    if args.strategy in OF_NETWORKS:
        check_networks(args.num_samples, args.strategy)
    output = RowFile(args.output)
    if output.path.resolve() == Path(args.pool).resolve():
        raise BlobError(f"--output {args.output} is the pool itself")
    if output.path.exists() and not args.overwrite_output:
        raise BlobError(f"{output.path} exists; choose another --output, or --overwrite_output")
    folder = resolve(args.adapter)
    pool = Pool.read(folder, args.pool, args.text_columns, args.delimiter)
    if clash := {RANK, SCORE, ENTROPY, EPISTEMIC} & set(pool.rows.column_names):
        raise BlobError(f"the column {min(clash)!r} has the name of a result; rename it in {args.pool}")
    check_count(args.count, len(pool))
    if args.strategy == "random":
        rows = rows_by_chance(pool, args.count, args.seed)
    else:
        model = load_networks(folder).to(state.device)
        rows = acquire_rows(
            model, pool, args.strategy, args.count, sampling, args.batch_size, args.max_length, args.candidates
        )
    output.write(rows)
    return len(rows)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = command_parser("acquire", __doc__)
    own.add_argument("adapter", help="folder or Hub repo of an adapter, of any method, that tells classes or choices")
    own.add_argument("--pool", required=True, help=f"file of unlabelled rows: {FORMATS}")
    own.add_argument("--count", type=int, required=True, help="rows to choose")
    own.add_argument("--strategy", choices=STRATEGIES, default="batchbald", help="by what; see docs/active.md")
    own.add_argument("--output", required=True, help="jsonl, csv or tsv file to write, in order of acquisition")
    own.add_argument("--overwrite_output", action="store_true", help="replace the output if it is there")
    add_columns(own)
    own.add_argument("--num_samples", type=int, default=NUM_SAMPLES, help="posterior samples; 0: the mean (entropy)")
    add_layers(own)
    add_asking(own, "names the samples, and what is drawn by chance", batch_size=32)
    own.add_argument(
        "--candidates", type=int, default=CANDIDATES, help="batchbald: rows of the highest BALD scores that it weighs"
    )
    return own


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors("run it again"):
        args = parser().parse_args(argv)
        setup_logging(is_main=True, quiet_libraries=True)
        count = acquire_file(args)
        print(f"{count} rows of {args.pool} to label next are in {args.output}")


if __name__ == "__main__":
    main()
