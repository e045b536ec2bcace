"""Predict for new texts: `blob predict ADAPTER --input FILE --output FILE`, with what the samples say of its certainty.

The file needs no labels and may be long: it is predicted in pieces, and the rows of a piece are on the disk before
the next is begun. The same command goes on after a kill. Under `accelerate launch -m blob_hf predict ...` (or torchrun)
all processes share the work, and the file is that of one process.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from peft import TaskType
from tqdm.auto import tqdm

from blob_hf.cli.adapters import load_networks
from blob_hf.cli.commands import (
    add_asking,
    add_columns,
    add_layers,
    command_parser,
    fingerprint,
    processes,
    refuse_of_writers,
)
from blob_hf.cli.limits import check_numbers
from blob_hf.cli.question_files import CHOICES, QuestionFile
from blob_hf.cli.row_files import Row, RowFile, TextFile
from blob_hf.cli.terminal import setup_logging, user_errors
from blob_hf.data.conversations import is_conversation, prompt_column
from blob_hf.data.loading import FORMATS
from blob_hf.data.summarization import DEFAULT_PROMPT
from blob_hf.inference.answers import Prediction, TextPrediction
from blob_hf.inference.choices import ChoiceScoring
from blob_hf.inference.inputs import is_decoder
from blob_hf.inference.predictor import DECODINGS
from blob_hf.metrics.entailment import EntailmentEquivalence
from blob_hf.tuner.adapter_files import read_config, resolve
from blob_hf.tuner.base_model import is_sequence_classifier
from blob_hf.tuner.sampling import AUTO, AUTO_TOLERANCE, DRAWS, Sampling, as_sampling
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError
from blob_hf.utils.numbers import whole_or_word

_BATCHES = 4  # that are predicted together: rows of similar length among them share a batch
_GO_ON = "the same command goes on from the rows that are written"
_RESULTS = (
    "id", "label", "probability", "probabilities", "entropy", "generated_text", "samples", "sample_sets", "uncertainty",
    "abstain", "networks", "prediction_set",
)  # fmt: skip
_OF_WRITERS = ("prompt", "decoding", "max_new_tokens", "num_beams", "stop_strings", "equivalence")


class Predictor:
    """A model and the arguments it predicts with."""

    def __init__(self, args: argparse.Namespace, folder: Path, device: torch.device) -> None:
        self.args, self.folder = args, folder
        self.sampling = _sampling(args)
        self.model = load_networks(folder).to(device)
        base: Any = self.model.get_base_model()
        self.options: dict[str, Any] = {"max_length": args.max_length, "batch_size": args.batch_size}
        if not is_sequence_classifier(base):
            written = args.prompt or (DEFAULT_PROMPT if base.config.is_encoder_decoder else None)
            self.options |= {
                "prompt": written, "decoding": args.decoding, "max_new_tokens": args.max_new_tokens,
                "num_beams": args.num_beams, "stop_strings": args.stop_strings,
                "equivalence": EntailmentEquivalence(args.equivalence, device=device) if args.equivalence else None,
            }  # fmt: skip

    def __call__(self, rows: Sequence[Row], columns: Sequence[str]) -> Prediction | TextPrediction:
        """Answers for the texts or conversations in these columns."""
        if CHOICES in columns:
            asked = [{name: row[name] for name in columns if row[name] is not None} for row in rows]
            plain = {name: self.options[name] for name in ("max_length", "batch_size")}
            return self.model.predict(asked, sampling=self.sampling, **plain)
        texts: list[Any] = [tuple(row[name] for name in columns) for row in rows]
        if len(columns) == 1:
            own = columns[0]
            texts = [
                {own: row[own]} if is_conversation(row[own]) and prompt_column(columns) else row[own] for row in rows
            ]
        return self.model.predict(texts, sampling=self.sampling, **self.options)

    def entropies(self, source: TextFile) -> np.ndarray:
        """Of all rows of a file, nats."""
        blocks = _blocks(source.rows(), self.args.batch_size * _BATCHES)
        return np.concatenate([self(block, source.columns).entropy for block in blocks])


def predict_file(args: argparse.Namespace) -> int:
    """Write a row for each row of the input; go on where the same command has stopped before.

    Returns:
        Number of rows in the output.

    Raises:
        BlobError: The adapter or the file cannot be read, it is not clear which columns are the texts, or the output
            is of another adapter, input or settings.
    """
    state = processes()
    ready: list[Any] = [None]
    if state.is_main_process:  # alone: it changes the output's end
        try:
            ready = [_prepare(args)]
        except BlobError as error:
            ready = [error]
    broadcast_object_list(ready)
    if isinstance(ready[0], BlobError):
        raise ready[0]
    folder, source, done = ready[0]
    if done < source.count:
        _write_rows(args, state, folder, source, done)
    state.wait_for_everyone()
    if state.num_processes > 1:
        state.destroy_process_group()
    return source.count


def _sampling(args: argparse.Namespace) -> Sampling:
    """The samples that the flags ask for."""
    return as_sampling(
        args.num_samples, args.tolerance, args.draw, seed=args.seed, batch_size=args.posterior_batch_size,
        layers=args.layers,
    )  # fmt: skip


def _prepare(args: argparse.Namespace) -> tuple[Path, TextFile, int]:
    """The adapter's folder, the input, and how many rows of the output are there already."""
    check_numbers(args)
    _sampling(args)  # refuses what is out of range
    if (args.coverage is None) != (args.calibration_file is None):
        raise BlobError("--coverage needs a --calibration_file to find the threshold for it, and the other way round")
    if args.coverage is not None and (args.abstain_above is not None or not 0 < args.coverage <= 1):
        raise BlobError("give --abstain_above, or a --coverage above 0 and at most 1; not both")
    if args.equivalence is not None and _sampling(args).num_samples < 2:
        raise BlobError(f"--equivalence compares two or more sampled answers; got --num_samples {args.num_samples}")
    output = RowFile(args.output)
    folder = resolve(args.adapter)
    task = read_config(folder).task_type
    if task == TaskType.SEQ_CLS:
        refuse_of_writers(args, parser(), _OF_WRITERS)
    source = _survey(args, folder, args.input, prompts=task == TaskType.CAUSAL_LM)
    if output.path.resolve() == Path(source.path).resolve():
        raise BlobError(f"--output {args.output} is the input itself")
    if clash := set(source.columns) & set(_RESULTS):
        raise BlobError(f"the text column {min(clash)!r} has the name of a result; rename it in {args.input}")
    settings = {
        "adapter": fingerprint(folder), "input": source.fingerprint, "text_columns": list(source.columns),
        **{name: getattr(args, name) for name in (
            "num_samples", "draw", "layers", "tolerance", "seed", "max_length", "prompt", "decoding", "max_new_tokens",
            "num_beams", "abstain_above", "coverage", "calibration_file", "stop_strings", "equivalence",
        )},
    }  # fmt: skip
    return folder, source, _claim(output, settings, args.overwrite_output)


def _survey(args: argparse.Namespace, folder: Path, path: str, prompts: bool, split: str = "input") -> TextFile:
    """A file, looked through: of texts, or of questions with choices where the adapter answers such.

    (With --text_columns even that adapter's model writes on.)
    """
    if args.text_columns is None and ChoiceScoring.load(folder) is not None:
        refuse_of_writers(args, parser(), _OF_WRITERS)
        return QuestionFile.of(path, args.delimiter, split)
    return TextFile.survey(path, args.text_columns, args.delimiter, split, prompts)


def _claim(output: RowFile, settings: Mapping[str, Any], overwrite: bool) -> int:
    """Have an output for these settings: how many complete rows of them it holds."""
    record = _record(output.path)
    if overwrite:
        output.path.unlink(missing_ok=True)
    elif output.path.is_file() and output.path.stat().st_size:
        old = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        changed = [name for name, value in settings.items() if old.get(name) != value]
        if changed:
            what = f"of other settings ({', '.join(changed[:5])} changed)" if old else "that blob predict did not write"
            raise BlobError(f"{output.path} holds rows {what}; choose another --output, or --overwrite_output")
        return output.go_on()
    files.write_text(record, json.dumps(settings, indent=2) + "\n")
    return 0


def _record(output: Path) -> Path:
    """Where it is kept what an output was made of."""
    return output.with_name(f"{output.name}.settings.json")


def _write_rows(args: argparse.Namespace, state: PartialState, folder: Path, source: TextFile, done: int) -> None:
    """Predict in blocks that depend neither on the processes nor on where an earlier run stopped: so do no rounding
    errors, and the file is the same."""
    predictor, output = Predictor(args, folder, state.device), RowFile(args.output)
    threshold = _threshold(args, state, predictor)
    size = args.batch_size * _BATCHES
    first = done // size * size
    blocks = _blocks(source.rows(first), size)
    with tqdm(total=source.count, initial=done, desc="rows", disable=None if state.is_main_process else True) as bar:
        while turn := list(islice(blocks, state.num_processes)):  # a block for each process
            own = turn[state.process_index : state.process_index + 1]
            rows = [
                row
                for block in gather_object([_answered(b, source, predictor, threshold) for b in own])
                for row in block
            ]
            first, rows = first + len(rows), rows[max(0, done - first) :]
            if state.is_main_process:
                output.append(rows)
                bar.update(len(rows))


def _answered(block: Sequence[Row], source: TextFile, predictor: Predictor, threshold: float | None) -> list[Row]:
    found = predictor(block, source.columns)
    rows = [{**row, **_to_six_decimals(record)} for row, record in zip(block, found.records(), strict=True)]
    if threshold is not None:
        rows = [{**row, "abstain": bool(value > threshold)} for row, value in zip(rows, found.entropy, strict=True)]
    return rows


def _to_six_decimals(value: Any) -> Any:
    """Numbers to the sixth decimal: further ones are float32's noise, and not the same on every machine."""
    if isinstance(value, dict):
        return {name: _to_six_decimals(one) for name, one in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def _threshold(args: argparse.Namespace, state: PartialState, predictor: Predictor) -> float | None:
    """Entropy in nats above which it abstains: given, or that which answers a share of the calibration rows."""
    if args.coverage is None:
        return args.abstain_above
    record = _record(Path(args.output))
    found: list[Any] = [None]
    if state.is_main_process:
        settings = json.loads(record.read_text(encoding="utf-8"))
        if "threshold" not in settings:
            prompts = is_decoder(predictor.model)
            source = _survey(args, predictor.folder, args.calibration_file, prompts, "calibration")
            entropies = predictor.entropies(source)
            settings["threshold"] = float(np.quantile(entropies, args.coverage, method="inverted_cdf"))
            files.write_text(record, json.dumps(settings, indent=2) + "\n")
        found = [settings["threshold"]]
        print(f"abstaining above an entropy of {found[0]:.6g} nats, which answers {args.coverage:.0%} of "
              f"{args.calibration_file}")  # fmt: skip
    broadcast_object_list(found)
    return float(found[0])


def _blocks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while block := list(islice(rows, size)):
        yield block


def _number_of_samples(value: str) -> int | str:
    found = whole_or_word(value)
    if isinstance(found, str) and found != AUTO:
        raise argparse.ArgumentTypeError(f"a whole number or {AUTO}, got {value!r}")
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = command_parser("predict", __doc__)
    own.add_argument("adapter", help="folder or Hub repo of an adapter, of any method")
    own.add_argument("--input", required=True, help=f"file of texts: {FORMATS}")
    own.add_argument("--output", required=True, help="jsonl, csv or tsv file to write, or to go on with")
    own.add_argument("--overwrite_output", action="store_true", help="replace the output instead of going on with it")
    add_columns(own, "those that can only be meant; of causal models prompt, else messages, first")
    own.add_argument(
        "--num_samples", type=_number_of_samples, default=Sampling.num_samples,
        help="posterior samples; 0: the mean; auto: classes by as many as each input needs",
    )  # fmt: skip
    own.add_argument("--draw", choices=DRAWS, help="of the samples; default: iid, of as many as needed antithetic")
    add_layers(own)
    own.add_argument(
        "--tolerance", type=float, help="standard error of the probabilities that is small enough; auto: "
        f"{AUTO_TOLERANCE} unless given",
    )  # fmt: skip
    add_asking(own, "names the samples", batch_size=16)
    own.add_argument(
        "--abstain_above", type=float, help="abstain from rows of a larger entropy in nats (of texts: a token)"
    )
    own.add_argument(
        "--coverage", type=float, help="instead: abstain so that this share of --calibration_file is answered"
    )
    own.add_argument("--calibration_file", help="texts like those to come, for --coverage; needs no labels")
    own.add_argument("--prompt", help=f"summarizers: the prompt of the training (default: {DEFAULT_PROMPT!r})")
    own.add_argument("--decoding", choices=DECODINGS, default=DECODINGS[0], help="models that write: which text")
    own.add_argument("--max_new_tokens", type=int, default=128, help="models that write: longest text in tokens")
    own.add_argument("--num_beams", type=int, default=1, help="models that write: beams")
    own.add_argument("--stop_strings", nargs="+", help="models that write: a text ends before the first of these")
    own.add_argument(
        "--equivalence", help="NLI model that says which sampled answers mean the same; default: their words"
    )
    return own


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors(_GO_ON):
        args = parser().parse_args(argv)
        setup_logging(processes().is_main_process, quiet_libraries=True)
        count = predict_file(args)
        if processes().is_main_process:
            print(f"{count} predictions are in {args.output}")


if __name__ == "__main__":
    main()
