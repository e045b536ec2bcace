#!/usr/bin/env python
"""Fine-tune a classifier with BLoB (Bayesian LoRA) on RTE, MRPC, CoLA, WiC, BoolQ or your own files.

The defaults are the paper's experiment on RoBERTa-base; `--demo` runs everything without network in about a minute.
beta is the standard deviation of the prior on A. gamma sets the period M of the KL re-weighting cycle,
M = int(100 * n**(pi/gamma) / global batch size): larger gamma, shorter cycle, more KL per step.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    set_seed,
)

from blob_hf import BlobTrainer, BlobTrainingArguments, cli, runs
from blob_hf.config import default_target_modules
from blob_hf.data import demo
from blob_hf.data.glue import TASKS, load_classification, tokenize_classification
from blob_hf.data.loading import first_rows
from blob_hf.evaluation import classification_metrics
from blob_hf.hub import fetching
from blob_hf.reporting.plots import plot_reliability
from blob_hf.reporting.run_summary import DataSource

METRICS = ["accuracy", "ece", "nll", "brier"]
DEMO = {
    "model_name_or_path": str(demo.BACKBONE_DIR),
    "train_file": str(demo.CLASSIFICATION_FILES["train"]),
    "validation_file": str(demo.CLASSIFICATION_FILES["validation"]),
    "max_length": 64,
    "max_steps": 200,
    "learning_rate": 5e-3,
    "logging_steps": 20,
    "per_device_eval_batch_size": 64,
    "compare_base": True,
}


@dataclass
class ModelArguments(runs.AdapterArguments):
    """Which model, and which adapter on it."""

    model_name_or_path: str = field(default="roberta-base", metadata={"help": "Base model: Hub id or local folder."})


@dataclass
class DataArguments:
    """Which data, and how much of it."""

    task_name: str | None = field(
        default=None,
        metadata={"help": f"A task of the paper: {', '.join(TASKS)}. Default: rte, unless files are given."},
    )
    train_file: str | None = field(default=None, metadata={"help": "csv, json or jsonl file (or .gz) to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "File to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "File (with labels) for --do_predict."})
    text_columns: list[str] | None = field(default=None, metadata={"help": "One or two text columns of your files."})
    label_column: str = field(default="label", metadata={"help": "Label column of your files."})
    max_length: int = field(default=256, metadata={"help": "Longest input in tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for evaluation."})
    compare_base: bool = field(default=False, metadata={"help": "Also evaluate the model as it was before training."})
    demo: bool = field(default=False, metadata={"help": "Run on embedded data and a tiny embedded model, no network."})


@dataclass
class TrainingArguments(runs.PublishedDefaults, BlobTrainingArguments):
    """transformers' and BLoB's training arguments with the published defaults."""

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch size per device."})
    max_steps: int = field(default=5000, metadata={"help": "Optimizer steps."})


def main() -> None:
    parsed = cli.parse_arguments((ModelArguments, DataArguments, TrainingArguments), DEMO, __doc__)
    model_args, data_args, training_args = parsed
    cli.setup_logging(training_args)
    cli.run_everything_by_default(training_args)

    # ----- data -----
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    files = {split: path for split, path in files.items() if path}
    task_name = data_args.task_name or (None if files else "rte")
    data = load_classification(task_name, files, data_args.text_columns, data_args.label_column)
    if files:
        source = DataSource("demo replies" if data_args.demo else task_name or Path(next(iter(files.values()))).stem)
    else:
        source = DataSource(task_name, TASKS[task_name].dataset, task_name)
    cli.default_output_dir(training_args, source.name.replace(" ", "-"), model_args.adapter_name_or_path)
    adapter = runs.adapter_folder(model_args, training_args)
    if training_args.do_train:
        runs.require_split(data.splits, "train")
        cli.claim_output_dir(training_args, model_args, data_args)
    for split in data.splits:
        limit = data_args.max_train_samples if split == "train" else data_args.max_eval_samples
        data.splits[split] = first_rows(data.splits[split], limit)

    # ----- model -----
    set_seed(training_args.seed)
    with fetching("model", model_args.model_name_or_path, "--model_name_or_path"):
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=len(data.label_names))
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        base = AutoModelForSequenceClassification.from_pretrained(
            model_args.model_name_or_path, config=config, dtype=model_args.dtype
        )
    tokenized = tokenize_classification(data, tokenizer, data_args.max_length)
    targets = model_args.target_modules or default_target_modules(config.model_type, "classification")
    model = runs.make_model(base, model_args, training_args, targets, "SEQ_CLS", adapter)

    trainer = BlobTrainer(
        model=model,
        args=training_args,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=tokenized.get("train") if training_args.do_train else None,
        eval_dataset=tokenized.get("validation"),
        processing_class=tokenizer,
        compute_metrics=classification_metrics,
    )

    # ----- train, evaluate, report -----
    settings = {"max length": data_args.max_length}
    base_name, license = model_args.model_name_or_path, model_args.adapter_license
    run = runs.Run(trainer, base_name, source, "text-classification", METRICS, settings, license)
    if data_args.compare_base and training_args.do_train and "validation" in tokenized:
        metrics = trainer.predict(tokenized["validation"], metric_key_prefix="base").metrics
        run.add_results("base", metrics, "validation", of_adapter=False)
    if training_args.do_train:
        run.train()
    for prefix, split, wanted in (
        ("eval", "validation", training_args.do_eval),
        ("predict", "test", training_args.do_predict),
    ):
        if wanted and split in tokenized:
            output = trainer.predict(tokenized[split], metric_key_prefix=prefix)
            log_probs, _, mean = output.predictions
            run.add_results(prefix, output.metrics, split, f"{len(mean)} examples")
            shown = {"posterior mean (N=0)": mean}
            if trainer.num_eval_samples:
                shown[f"{trainer.num_eval_samples} samples"] = log_probs
            plot = "reliability" if prefix == "eval" else f"reliability_{split}"
            run.add_plot(plot, lambda path, s=shown, y=output.label_ids: plot_reliability(s, y, path))
            run.write_rows(f"{split}_predictions.jsonl", _rows(log_probs, mean, output.label_ids))
    run.finish()


def _rows(log_probs, mean, labels):
    for index, row in enumerate(zip(log_probs, mean, labels, strict=True)):
        yield {"index": index, "log_probs": row[0].tolist(), "mean_log_probs": row[1].tolist(), "label": int(row[2])}


if __name__ == "__main__":
    with cli.user_errors():
        main()
