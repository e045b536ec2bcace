#!/usr/bin/env python
"""Fine-tune a causal language model with BLoB (Bayesian LoRA), or one of its peers, on texts or conversations.

TRL reads the rows (columns prompt and completion, messages, or text), masks and packs them; BLoB trains them and
reports NLL and perplexity of the posterior mean and of the predictive. The defaults are ours, not a published
experiment's. Needs TRL: pip install 'blob_hf[trl]'.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, set_seed

from blob_hf import BlobError, cli
from blob_hf.cli.language_run import LANGUAGE_METRICS, LanguageRun
from blob_hf.data.loading import FORMATS, hold_out, load_files, load_hub
from blob_hf.reporting.run_summary import DataSource
from blob_hf.trainer.sft_rows import check_set
from blob_hf.tuner.config import default_target_modules

with cli.user_errors():  # one line where there is no TRL
    from blob_hf.trainer.sft import BlobSFTConfig, BlobSFTTrainer


@dataclass
class ModelArguments(cli.AdapterArguments):
    """Which model, and which adapter on it."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Base model: Hub id or local folder."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's alpha: its update is scaled by alpha / r."})


@dataclass
class DataArguments(cli.RowArguments):
    """Which rows, and how many."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, or folder of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(
        default=None, metadata={"help": f"Columns prompt and completion, messages, or text: {FORMATS}."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "File to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "File for --do_predict."})
    calibration_file: str | None = field(
        default=None,
        metadata={
            "help": "Rows to fit --posterior_scale and --early_stopping_patience to. Default: --calibration_samples "
            "of the training rows, which are then not trained on."
        },
    )
    # TRL's --dataset_num_proc and --packing stand for these
    pad_to_max_length: bool = field(default=False, init=False)
    preprocessing_num_workers: int | None = field(default=None, init=False)
    overwrite_cache: bool = field(default=False, init=False)


@dataclass
class TrainingArguments(cli.PublishedDefaults, BlobSFTConfig):
    """TRL's and BLoB's training arguments with defaults for LoRA."""

    per_device_train_batch_size: int = field(default=8, metadata={"help": "Batch size per device."})
    learning_rate: float = field(default=2e-4, metadata={"help": "AdamW's learning rate."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training rows."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    bf16: bool | None = field(
        default=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        metadata={"help": "Mixed precision; the posterior is float32. Default: where the GPU can."},
    )
    trust_remote_code: bool = field(default=False, init=False)  # the model arguments have it


def main() -> None:
    types = (ModelArguments, DataArguments, cli.MethodArguments, TrainingArguments)
    model_args, data_args, method_args, training_args = cli.parse_arguments(types, {}, __doc__)
    cli.setup_logging(training_args.should_log)
    base_name = model_args.model_name_or_path
    if base_name is None:
        raise BlobError("which model? give --model_name_or_path, a causal language model")
    route = cli.choose_route(model_args, method_args, training_args)
    route.check_run(method_args, training_args)
    route.check_texts()
    if method_args.temperature_scaling:
        raise BlobError("temperature_scaling calibrates class probabilities; for texts leave it out")
    if method_args.conformal_alpha is not None:
        raise BlobError("conformal_alpha is for classes and summaries; for other texts leave it out")
    cli.warn_of_ignored(route, method_args, training_args, model_args, data_args)

    # ----- data -----
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    files = {split: path for split, path in files.items() if path}
    if files:
        source = DataSource(cli.name_of_files(files, {}, "texts"))
        splits = load_files(files)
    elif name := data_args.dataset_name:
        source = DataSource(Path(name).name, None if Path(name).exists() else name, data_args.dataset_config_name)
        splits = load_hub(name, data_args.dataset_config_name, "--train_file and --validation_file")
    else:
        raise BlobError("no data: give --train_file, --validation_file or --dataset_name")
    folder = route.folder_name(source.name.replace(" ", "-"), training_args)
    training_args = cli.with_output_dir(training_args, folder, model_args.adapter_name_or_path)
    adapter = cli.starting_adapter(route, model_args, method_args, training_args)
    model_args = cli.with_saved_revision(model_args, base_name, adapter)
    if training_args.do_train:
        cli.require_split(splits, "train")
    claim = cli.claim_output_dir(training_args, adapter is None, method_args, model_args, data_args)
    for split in splits:
        splits[split] = data_args.chosen(splits[split], split)
    if data_args.calibration_file:
        splits.update(load_files({"calibration": data_args.calibration_file}))
    elif training_args.do_train and route.holds_out(method_args):
        hold_out(splits, method_args.calibration_samples)
    used = [split for _, split in cli.asked_splits(training_args, splits)]
    used += ["train"] if training_args.do_train else []
    used += ["calibration"] if route.holds_out(method_args) and "calibration" in splits else []
    for split in used:  # before a long training, not after it
        check_set(splits[split], training_args.dataset_text_field, split)

    # ----- model -----
    set_seed(training_args.seed)
    config = model_args.load_config(base_name)
    tokenizer = model_args.load_tokenizer(base_name)
    if model_args.target_modules is None:
        targets = default_target_modules(config.model_type, "text")
        model_args = dataclasses.replace(model_args, target_modules=[targets] if isinstance(targets, str) else targets)

    def make_model():
        base = model_args.load_model(AutoModelForCausalLM, base_name, config=config, dtype=model_args.dtype)
        return cli.make_model(route, base, model_args, method_args, training_args, "CAUSAL_LM", adapter)

    train_rows = splits.get("train") if training_args.do_train else None
    held_out = splits.get("calibration") if route.holds_out(method_args) else None
    evaluated = splits.get("validation", splits.get("test"))
    if train_rows is None and evaluated is None:
        raise BlobError("nothing to evaluate: give --validation_file or --test_file")

    def make_trainer(model, args=training_args):
        args, callbacks = cli.early_stopping(route, args, method_args, len(train_rows or []))
        return BlobSFTTrainer(
            model=model,
            args=route.arguments(args, train_rows),
            train_dataset=train_rows,
            eval_dataset=held_out if callbacks else evaluated,
            callbacks=callbacks,
            processing_class=tokenizer,
            point_estimate=route.name != "blob" and not model.has_posterior,
        )

    # ----- train, evaluate, report -----
    trainer = make_trainer(make_model())
    settings = {
        name: getattr(training_args, name)
        for name in ("max_length", "packing", "completion_only_loss", "assistant_only_loss")
    }
    job = cli.Job(training_args, method_args, make_model, make_trainer, held_out)
    run = LanguageRun(
        route, job, trainer, base_name, source, "text-generation", LANGUAGE_METRICS, settings,
        model_args.adapter_license,
    )  # fmt: skip
    if training_args.do_train:
        claim.settle()
        run.train()
    run.scale()
    for prefix, split in cli.asked_splits(training_args, splits):
        output = trainer.predict(splits[split], metric_key_prefix=prefix)
        run.add_scores(prefix, output, split, len(splits[split]))
    run.finish()


if __name__ == "__main__":
    with cli.user_errors():
        main()
