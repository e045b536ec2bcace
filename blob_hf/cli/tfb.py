"""Give a trained LoRA adapter a posterior without training: `blob tfb SRC DST --anchor_file FILE`.

Training-free Bayesianization (Shi et al., NeurIPS 2025; see `blob_hf.baselines.tfb`) of a plain LoRA adapter from a
folder or the Hub, a classifier or a summarizer. The result is a folder that `BlobModel.from_pretrained` loads.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithPadding

from blob_hf.baselines.tfb import TFBConfig, TFBState, anchor_rows, fit_tfb
from blob_hf.cli.commands import command_parser
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.route import require_plain
from blob_hf.cli.terminal import user_errors
from blob_hf.data.classification import load_classification, tokenize_classification
from blob_hf.data.summarization import DEFAULT_PROMPT, Prompt, load_summaries, scoring_rows, single_references
from blob_hf.data.tasks import TASKS
from blob_hf.trainer import BlobSeq2SeqTrainer, BlobSeq2SeqTrainingArguments, BlobTrainer, BlobTrainingArguments
from blob_hf.tuner.adapter_files import read_config, resolve
from blob_hf.tuner.base_model import class_names, has_task_head, load_base_model
from blob_hf.tuner.build import load_lora
from blob_hf.utils.errors import BlobError
from blob_hf.utils.hub import fetching


def bayesianize_adapter(source: str, destination: str, args: argparse.Namespace) -> TFBState:
    """Search sigma_q on the anchors and write the adapter with its posterior.

    Args:
        source: Folder or Hub repo of a plain LoRA adapter.
        destination: A folder without an adapter in it.
        args: As `parser()` gives them.

    Raises:
        BlobError: No plain LoRA adapter, no anchors or anchors that do not fit it, or the destination is taken.
    """
    folder, target = resolve(source), Path(destination)
    if (target / CONFIG_NAME).exists():
        raise BlobError(f"{target} already holds an adapter; choose another folder")
    search = TFBConfig(args.tolerance, args.bound, args.samples)
    require_plain(folder, "tfb")
    config = read_config(folder)
    base: Any = load_base_model(folder, config, None, {})
    name = str(folder) if (folder / "tokenizer_config.json").is_file() else str(config.base_model_name_or_path)
    with fetching("tokenizer", name, "the adapter's base model"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    is_classifier = has_task_head(base)
    rows = (_classified if is_classifier else _summarized)(args, tokenizer, base)
    model = load_lora(base, folder)
    kind: Any = BlobTrainingArguments if is_classifier else BlobSeq2SeqTrainingArguments
    with tempfile.TemporaryDirectory() as scratch:
        training_args = kind(
            scratch, report_to="none", per_device_eval_batch_size=args.batch_size, dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        collator = DataCollatorWithPadding(tokenizer) if is_classifier else DataCollatorForSeq2Seq(tokenizer, base)
        trainer = (BlobTrainer if is_classifier else BlobSeq2SeqTrainer)(
            model=model, args=training_args, data_collator=collator, point_estimate=True
        )
        anchors = anchor_rows(rows, args.num_anchors)
        state = fit_tfb(model, lambda count: trainer.mean_nll(anchors, count), search, len(anchors))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return state


def _classified(args: argparse.Namespace, tokenizer: Any, base: Any) -> Any:
    classes = class_names(base) or base.config.num_labels
    data = load_classification(
        args.task_name, {"train": args.anchor_file}, args.text_columns, args.label_column, classes=classes
    )
    return tokenize_classification(data, tokenizer, args.max_length)["train"]


def _summarized(args: argparse.Namespace, tokenizer: Any, base: Any) -> Any:
    if not base.config.is_encoder_decoder:
        raise BlobError(f"tfb works for classifiers and encoder-decoder models, not for {type(base).__name__}")
    splits = load_summaries(None, None, {"train": args.anchor_file}, args.text_column, args.summary_column)
    pairs = single_references(splits["train"])
    return scoring_rows(pairs, tokenizer, Prompt(args.prompt), args.max_length, args.max_target_length)


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are those of `--method tfb`."""
    own = command_parser("tfb", __doc__)
    own.add_argument("source", help="folder or Hub repo of a plain LoRA adapter")
    own.add_argument("destination", help="new folder for the adapter with its posterior")
    own.add_argument("--anchor_file", required=True, help="csv, json or jsonl file of examples with labels")
    own.add_argument("--task_name", choices=list(TASKS), help="classifiers: whose columns the file has")
    own.add_argument("--text_columns", nargs="+", help="classifiers: one or two text columns")
    own.add_argument("--label_column", default="label", help="classifiers: column of the labels")
    own.add_argument("--text_column", default="dialogue", help="summarizers: column of the texts")
    own.add_argument("--summary_column", default="summary", help="summarizers: column of the summaries")
    own.add_argument("--prompt", default=DEFAULT_PROMPT, help="summarizers: the prompt of the training")
    own.add_argument("--max_length", type=int, default=256, help="longest input in tokens")
    own.add_argument("--max_target_length", type=int, default=128, help="longest summary in tokens")
    own.add_argument("--batch_size", type=int, default=16, help="examples in a batch")
    own.add_argument("--num_anchors", type=int, default=MethodArguments.num_anchors, help="examples taken of the file")
    own.add_argument("--tolerance", type=float, default=TFBConfig.tolerance, help="relative increase of NLL")
    own.add_argument("--bound", type=float, default=TFBConfig.bound, help="largest sigma_q to try")
    own.add_argument("--samples", type=int, default=TFBConfig.num_samples, help="samples in the loss")
    return own


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with user_errors():
        state = bayesianize_adapter(args.source, args.destination, args)
        print(
            f"{args.destination}: sigma_q = {state.sigma_q:.4g}; the NLL of {state.anchors} anchors changes from "
            f"{state.anchor_nll:.4f} by {100 * state.relative_change:+.2f} % (at most {100 * state.tolerance:g} %)"
        )
