"""One plain LoRA adapter that answers as a posterior does: `blob distil ADAPTER --data FILES --output DIR`.

The teacher, an adapter of any method with samples, is asked once for its posterior predictive of every row, and a
student is trained on that. What it answered is kept in DIR: the same command goes on after a kill. The files need no
labels. Under `accelerate launch -m blob_hf distil ...` the processes share the work.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from blob_hf.cli.adapters import saved_method
from blob_hf.cli.bases import BASE_FOLDER
from blob_hf.cli.commands import (
    add_asking,
    add_columns,
    command_parser,
    fingerprint,
    processes,
    refuse_of_writers,
)
from blob_hf.cli.distil_rows import ANSWERS, Given, read_rows
from blob_hf.cli.limits import check_numbers
from blob_hf.cli.terminal import setup_logging, user_errors
from blob_hf.data.loading import FORMATS
from blob_hf.distillation import (
    ClassRows,
    Comparison,
    DistilledState,
    DistilTrainer,
    TargetCache,
    TextRows,
    make_student,
    require_samples,
    score_texts,
)
from blob_hf.inference.choices import ChoiceScoring
from blob_hf.inference.inputs import find_tokenizer
from blob_hf.metrics.calibration import calibration_metrics
from blob_hf.reporting.model_card import write_model_card
from blob_hf.reporting.run_summary import DataSource, Results, RunSummary
from blob_hf.reporting.tables import to_text
from blob_hf.trainer.summary import method_card, method_settings
from blob_hf.tuner.adapter_files import CONFIG_NAME, resolve
from blob_hf.tuner.base_model import peft_loading
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import sampling_of
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

CACHE, RESULTS = "teacher", "distil_results.json"
_GO_ON = "the same command goes on; the teacher is not asked again for what it has answered"
_BATCHES = 4  # of rows in a shard of the cache: rows of similar length among them share a batch
_OF_WRITERS = ("target_column", "answers", "prompt", "max_new_tokens", "top_k")
_TASKS = {"SEQ_CLS": "text-classification", "SEQ_2_SEQ_LM": "summarization", "CAUSAL_LM": "text-generation"}


def distil(args: argparse.Namespace) -> Comparison | None:
    """Ask the teacher, train the student, save it, and say what it lost.

    Returns:
        Scores on --eval_data; None without, and on processes that do not write.

    Raises:
        BlobError: A teacher without samples, data that do not fit it, a rank or number out of range, or an output
            folder that holds something else.
    """
    state = processes()
    _check(args)
    folder, output = resolve(args.adapter), Path(args.output)
    method = saved_method(folder)
    require_samples(method, args.adapter)
    _claim(state, folder, output)
    teacher = BlobModel.from_pretrained(folder).eval().to(state.device)
    if teacher.classifies:
        refuse_of_writers(args, parser(), _OF_WRITERS)
    sampling = sampling_of(teacher, Sampling(args.num_samples, args.seed, batch_size=args.posterior_batch_size))
    given = read_rows(teacher, args, args.data, "data", labelled=False)
    held_out = read_rows(teacher, args, [args.eval_data], "eval_data", labelled=True) if args.eval_data else None
    student = make_student(folder, args.r, args.target_modules, args.seed)
    cache = TargetCache(output / CACHE, _key(args, folder, sampling))
    given.rows.ask(teacher, sampling, cache, args.batch_size, _BATCHES * args.batch_size)
    if state.is_main_process:
        print(f"{len(given.rows)} rows: the teacher (method {method}, N={sampling.num_samples}) answered "
              f"{cache.asked} of them now")  # fmt: skip
    trainer = DistilTrainer(student, _training(args), given.rows)
    trained = trainer.train()
    student = student.eval()
    found = DistilledState(args.adapter, method, sampling.num_samples, args.seed, len(given.rows), given.answers)
    student.set_companion(found)
    compared = None
    if state.is_main_process:
        _save(student, teacher, folder, output)
        compared = None if held_out is None else _compare(teacher, student, held_out, sampling, args)
        facts = {"loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}
        _report(student, output, args, {**facts, "train_runtime": trained.metrics["train_runtime"]}, compared)
    state.wait_for_everyone()
    if state.num_processes > 1:
        state.destroy_process_group()
    return compared


def _check(args: argparse.Namespace) -> None:
    check_numbers(args)
    for name in ("r", "top_k", "num_samples", "max_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BlobError(f"--{name} must be >= 1, got {value}")
    if not 0 <= args.seed < 2**32:
        raise BlobError(f"--seed must be from 0 to 2^32 - 1, got {args.seed}")


def _claim(state: PartialState, teacher: Path, output: Path) -> None:
    """Refuse a folder that holds another adapter; done by one process, before any writes."""
    refused: list[str | None] = [None]
    if state.is_main_process:
        if output.resolve() == teacher.resolve():
            refused = [f"--output {output} is the teacher's own folder; choose another"]
        elif output.exists() and not output.is_dir():
            refused = [f"--output {output} is a file; name a folder"]
        elif (output / CONFIG_NAME).is_file() and saved_method(output) != DistilledState.name:
            refused = [f"--output {output} holds an adapter that blob distil did not write; choose another folder"]
    broadcast_object_list(refused)
    if refused[0] is not None:
        raise BlobError(refused[0])


def _key(args: argparse.Namespace, folder: Path, sampling: Sampling) -> dict[str, object]:
    """What the teacher's answers depend on, beside the rows."""
    return {
        "teacher": fingerprint(folder), "num_samples": sampling.num_samples, "seed": sampling.seed,
        "batch_size": args.batch_size, "posterior_batch_size": args.posterior_batch_size, "top_k": args.top_k,
        "max_new_tokens": args.max_new_tokens, "max_length": args.max_length,
    }  # fmt: skip


def _training(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        args.output, max_steps=args.max_steps, learning_rate=args.learning_rate, warmup_steps=args.warmup_steps,
        per_device_train_batch_size=args.per_device_train_batch_size, seed=args.seed, save_strategy="no",
        report_to="none", logging_steps=max(1, args.max_steps // 20), use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(), disable_tqdm=args.disable_tqdm,
    )  # fmt: skip


def _save(student: BlobModel, teacher: BlobModel, folder: Path, output: Path) -> None:
    """The adapter, its tokenizer, and a base model that is kept beside the teacher."""
    student.save_pretrained(output)
    find_tokenizer(teacher).save_pretrained(output)
    if (folder / BASE_FOLDER).is_dir():
        shutil.copytree(folder / BASE_FOLDER, output / BASE_FOLDER, dirs_exist_ok=True)


# ----- what was lost ---------------------------------------------------------------------------------------------


def _compare(
    teacher: BlobModel, student: BlobModel, given: Given, sampling: Sampling, args: argparse.Namespace
) -> Comparison:
    student.to(teacher.device)
    scores, seconds = [], []
    for model, drawn in ((teacher, sampling), (teacher, Sampling(0)), (student, Sampling(0))):
        start = time.perf_counter()
        scores.append(_scorer(given, args.batch_size)(model, drawn))
        seconds.append(time.perf_counter() - start)
    names = ("teacher", "teacher_mean", "student")
    predictive, mean, own = scores
    took = dict(zip(names, seconds, strict=True))
    return Comparison(predictive, mean, own, sampling.num_samples, len(given.rows), took)


def _scorer(given: Given, batch_size: int) -> Callable[[BlobModel, Sampling], dict[str, float]]:
    rows = given.rows
    if isinstance(rows, TextRows):
        return lambda model, sampling: score_texts(model, rows, sampling, batch_size)
    assert isinstance(rows, ClassRows) and given.labels is not None
    labels = given.labels

    def score(model: BlobModel, sampling: Sampling) -> dict[str, float]:
        found = rows.answered(model, sampling, batch_size)
        with np.errstate(divide="ignore"):  # a choice that a question does not have
            return calibration_metrics(np.log(found.probabilities), labels)

    return score


def card_task(student: BlobModel) -> str | None:
    """What the Hub calls the task of a student; None where its adapter does not say."""
    if student.companion(ChoiceScoring.slot) is not None:
        return "multiple-choice"
    kind = student.active_peft_config.task_type
    return _TASKS.get(str(getattr(kind, "value", kind)))


def _report(
    student: BlobModel, output: Path, args: argparse.Namespace, facts: dict[str, Any], compared: Comparison | None
) -> None:
    """distil_results.json and the card."""
    settings = {"data": ", ".join(Path(path).name for path in args.data), "steps": args.max_steps,
                "learning rate": args.learning_rate}  # fmt: skip
    results = {"arguments": vars(args), **facts, "evaluation": None if compared is None else compared.facts()}
    files.write_text(output / RESULTS, json.dumps(results, indent=2) + "\n")
    auto_class, auto_arguments = peft_loading(student)
    config = student.active_peft_config
    summary = RunSummary(
        base_model=config.base_model_name_or_path or "", data=DataSource(Path(args.data[0]).name.split(".")[0]),
        method=student.method, card=method_card(student), settings={**method_settings(student), **settings},
        repo=str(output), task=card_task(student),
        auto_class=auto_class, auto_arguments=auto_arguments,
    )  # fmt: skip
    if compared is None:
        summary.notes.append("what it lost was not measured: no labelled rows were given")
        summary.sentence = "What it lost of its teacher was not measured: no labelled rows were given."
    else:
        name = Path(args.eval_data).name.split(".")[0]
        summary.sentence = compared.sentence()
        summary.results.append(Results(f"{name}, teacher and student", "test", compared.table(), in_index=False))
    write_model_card(output, summary)


# ----- the command line ------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = command_parser("distil", __doc__)
    own.add_argument("adapter", help="the teacher: folder or Hub repo of an adapter with samples, of any method")
    own.add_argument("--data", required=True, nargs="+", help=f"files of rows, labelled or not: {FORMATS}")
    own.add_argument("--output", required=True, help="folder for the student, and for what the teacher answered")
    own.add_argument("--eval_data", help="file of labelled rows: what the student lost is measured on it")
    add_columns(own)
    own.add_argument("--label_column", default="label", help="classifiers: of --eval_data")
    own.add_argument("--target_column", help="models that write: the answers; default summary, completion or messages")
    own.add_argument(
        "--answers", choices=ANSWERS, default="auto",
        help="models that write: taught along the answers of the data, the teacher's own, or each whole text; "
        "auto: the data's where there are any",
    )  # fmt: skip
    own.add_argument("--num_samples", type=int, default=Sampling.num_samples, help="of the predictive that is learned")
    add_asking(own, "names the samples, and orders the rows", 16, "rows together that the teacher is asked for")
    own.add_argument("--prompt", help="models that write: the prompt of the training")
    own.add_argument("--max_new_tokens", type=int, default=128, help="models that write: longest answer in tokens")
    own.add_argument("--top_k", type=int, default=32, help="models that write: tokens told apart; the rest are one")
    own.add_argument("--r", type=int, help="rank of the student; default: the teacher's")
    own.add_argument("--target_modules", nargs="+", help="layers of the student; default: the teacher's")
    own.add_argument("--max_steps", type=int, default=300, help="of the student's training")
    own.add_argument("--learning_rate", type=float, default=1e-3, help="of AdamW; it falls linearly")
    own.add_argument("--warmup_steps", type=float, default=0.06, help="steps, or a share of them")
    own.add_argument("--per_device_train_batch_size", type=int, default=16, help="rows of a step")
    own.add_argument("--disable_tqdm", action="store_true", help="no progress bar of the training")
    return own


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors(_GO_ON):
        args = parser().parse_args(argv)
        setup_logging(processes().is_main_process, quiet_libraries=True)
        compared = distil(args)
        if processes().is_main_process:
            if compared is not None:
                print(to_text(compared.table(), f"{args.eval_data}, {compared.rows} rows"))
                print(compared.sentence())
            print(f"the student is in {args.output}")


if __name__ == "__main__":
    main()
