#!/usr/bin/env python
"""Fine-tune a classifier with BLoB (Bayesian LoRA), or one of its peers, on tasks of GLUE and SuperGLUE or your files.

The defaults are the paper's experiment on RoBERTa-base; `--demo` runs everything without network in about a minute.
beta is the standard deviation of the prior on A. gamma sets the period M of the KL re-weighting cycle,
M = int(100 * n**(pi/gamma) / global batch size): larger gamma, shorter cycle, more KL per step.
"""

from dataclasses import dataclass, field

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed

from blob_hf import BlobTrainer, BlobTrainingArguments, cli
from blob_hf.cli.classifier_run import CLASSIFICATION_METRICS, ClassifierRun
from blob_hf.cli.evaluation import classification_metrics
from blob_hf.cli.search import SearchArguments, check_backend, check_route, search, searchable
from blob_hf.data import demo
from blob_hf.data.classification import load_classification, load_shifted, tokenize_classification, with_names
from blob_hf.data.loading import FORMATS, first_rows, hold_out
from blob_hf.data.tasks import TASKS, find_task
from blob_hf.tuner.base_model import named_classes

DEMO = {
    "model_name_or_path": str(demo.BACKBONE_DIR),
    "train_file": str(demo.CLASSIFICATION_FILES["train"]),
    "validation_file": str(demo.CLASSIFICATION_FILES["validation"]),
    "max_length": 64,
    "max_train_samples": 120,
    "max_steps": 120,
    "learning_rate": 5e-3,
    "logging_steps": 20,
    "per_device_eval_batch_size": 64,
    "compare_lora": True,
}


@dataclass
class ModelArguments(cli.AdapterArguments):
    """Which model, and which adapter on it."""

    model_name_or_path: str = field(default="roberta-base", metadata={"help": "Base model: Hub id or local folder."})


@dataclass
class DataArguments(cli.RowArguments):
    """Which data, and how much of it."""

    task_name: str | None = field(
        default=None,
        metadata={
            "help": f"One of {', '.join(TASKS)} (the first five the paper's). Default: rte, unless data is given."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Other data: Hub id, or folder of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": f"File to train on: {FORMATS}."})
    validation_file: str | None = field(default=None, metadata={"help": "File to evaluate on."})
    test_file: str | None = field(
        default=None, metadata={"help": "File for --do_predict; without labels it is predicted, not scored."}
    )
    delimiter: str | None = field(default=None, metadata={"help": "Of csv files. Default: found in each file."})
    calibration_file: str | None = field(
        default=None,
        metadata={
            "help": "Rows for --temperature_scaling, --posterior_scale, --conformal_alpha, --early_stopping_patience. "
            "Default: --calibration_samples of the training rows, which are then not trained on."
        },
    )
    text_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "One or two text columns. Default: those that can only be meant.",
            "aliases": ["--text_column_names", "--text-column-names", "--text_column"],
        },
    )
    label_column: str = field(
        default="label",
        metadata={"help": "Label column.", "aliases": ["--label_column_name", "--label-column-name"]},
    )
    max_length: int = field(
        default=256, metadata={"help": "Longest input in tokens.", "aliases": ["--max_seq_length", "--max-seq-length"]}
    )
    ood_tasks: list[str] | None = field(
        default=None, metadata={"help": "Other tasks: does the uncertainty tell their inputs from the own ones?"}
    )
    ood_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "The same for files: path, name=path, or task=path. Labels of a shifted own task are scored."
        },
    )
    compare_lora: bool = field(
        default=False,
        metadata={"help": "With --method blob: also train plain LoRA, with all else equal, and show both."},
    )
    compare_base: bool = field(default=False, metadata={"help": "Also evaluate the model as it was before training."})
    demo: bool = field(default=False, metadata={"help": "Run on embedded data and a tiny embedded model, no network."})


@dataclass
class TrainingArguments(cli.PublishedDefaults, BlobTrainingArguments):
    """transformers' and BLoB's training arguments with the published defaults."""

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch size per device."})
    max_steps: int = field(default=5000, metadata={"help": "Optimizer steps."})


def main() -> None:
    types = (ModelArguments, DataArguments, cli.MethodArguments, TrainingArguments, SearchArguments)
    parsed = cli.parse_arguments(types, DEMO, __doc__)
    model_args, data_args, method_args, training_args, search_args = parsed
    check_backend(search_args)
    cli.check_best_metric(training_args)
    cli.setup_logging(training_args.should_log)
    varied = [part.partition("=")[0] for part in search_args.hp_space or []]
    training_args = cli.with_kl_rate(training_args, method_args, model_args, data_args, varied=varied)
    route = cli.choose_route(model_args, method_args, training_args)
    route.check_run(method_args, training_args)
    cli.warn_of_ignored(route, method_args, training_args, model_args, data_args)
    if search_args.hp_search:
        training_args = searchable(training_args)

    # ----- data -----
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    files = {split: path for split, path in files.items() if path}
    dataset = (data_args.dataset_name, data_args.dataset_config_name) if data_args.dataset_name else None
    task_name = data_args.task_name or (None if files or dataset else "rte")
    name = task_name or cli.name_of_files(files, DEMO, "demo replies")
    task = (find_task(task_name).dataset, task_name) if task_name else None
    source = cli.data_source(name, files, task, (data_args.dataset_name, data_args.dataset_config_name))
    folder = route.folder_name(source.name.replace(" ", "-"), training_args)
    training_args = cli.with_output_dir(training_args, folder, model_args.adapter_name_or_path)
    adapter = cli.starting_adapter(route, model_args, method_args, training_args)
    base_name = model_args.model_name_or_path
    model_args = cli.with_saved_revision(model_args, base_name, adapter)
    model_args = cli.settle_head(model_args, task_name, fresh=adapter is None)
    columns = cli.split_names(data_args.text_columns)
    held_out_file = {"calibration": data_args.calibration_file} if data_args.calibration_file else {}
    data = load_classification(
        task_name, {**files, **held_out_file}, columns, data_args.label_column, dataset=dataset,
        delimiter=data_args.delimiter, classes=cli.known_classes(adapter), with_test=training_args.asks_to_predict,
    )  # fmt: skip
    if search_args.hp_search:
        check_route(route, search_args)
    if training_args.do_train:
        cli.require_split(data.splits, "train")
    claim = cli.claim_output_dir(training_args, adapter is None, method_args, model_args, data_args)
    for split in data.splits:
        data.splits[split] = data_args.chosen(data.splits[split], split)
    holds_out = route.holds_out(method_args) and (training_args.do_train or bool(held_out_file))
    if holds_out and "calibration" not in data.splits:
        hold_out(data.splits, method_args.calibration_samples)
    cli.hold_out_decisions(data.splits, route, method_args)

    # ----- model -----
    set_seed(training_args.seed)
    config = model_args.load_config(base_name)
    tokenizer = model_args.load_tokenizer(base_name)
    data = with_names(data, named_classes(config.id2label) if adapter is None else None)
    config.id2label = dict(enumerate(data.label_names))
    config.label2id = {name: index for index, name in config.id2label.items()}
    data.log()
    others = [*(data_args.ood_tasks or []), *(data_args.ood_file or [])]
    shifted = load_shifted(others, data, data_args.label_column)
    tokenized = tokenize_classification(data, tokenizer, data_args.max_length, **data_args.mapping())
    shifted = {
        name: first_rows(
            tokenize_classification(other, tokenizer, data_args.max_length)["shifted"], data_args.max_eval_samples
        )
        for name, other in shifted.items()
    }
    collator = DataCollatorWithPadding(tokenizer)
    if data_args.pad_to_max_length:
        longest = min(data_args.max_length, tokenizer.model_max_length)
        collator = cli.FixedLengths(collator, tokenizer, longest)

    def make_model(trial=None):
        return adapted_model(route)

    def adapted_model(route):
        kind, dtype = AutoModelForSequenceClassification, model_args.dtype
        base = model_args.load_model(kind, base_name, config=config, dtype=dtype)
        return cli.make_model(route, base, model_args, method_args, training_args, "SEQ_CLS", adapter)

    train_rows = tokenized.get("train") if training_args.do_train else None
    held_out = tokenized.get("calibration") if holds_out else None

    def make_trainer(model, args=training_args, model_init=None, route=route):
        args, callbacks = cli.early_stopping(route, args, method_args, len(train_rows or []))
        return BlobTrainer(
            model=None if model_init else model,
            args=route.arguments(args, train_rows),
            model_init=model_init,
            data_collator=collator,
            train_dataset=train_rows,
            eval_dataset=held_out if callbacks else tokenized.get("validation"),
            callbacks=callbacks,
            processing_class=tokenizer,
            compute_metrics=classification_metrics,
            point_estimate=route.name != "blob" and not model.has_posterior,
        )

    if search_args.hp_search:
        cli.require_split(tokenized, "validation")
        trainer = make_trainer(make_model(), model_init=make_model)
        claim.settle()
        search(trainer, search_args)
        return

    # ----- train, evaluate, report -----
    settings = {"max length": data_args.max_length}
    license = model_args.adapter_license
    trainer = make_trainer(make_model())
    decided_on = tokenized.get("conformal")
    job = cli.Job(training_args, method_args, make_model, make_trainer, held_out, decided_on)
    run = ClassifierRun(
        route, job, trainer, base_name, source, "text-classification", CLASSIFICATION_METRICS, settings, license
    )
    if data_args.compare_base and training_args.do_train and "validation" in tokenized:
        metrics = trainer.predict(tokenized["validation"], metric_key_prefix="base").metrics
        run.add_results("base", metrics, "validation", provisional=True)
    if training_args.do_train:
        claim.settle()
        run.train()
        if method_args.posterior_scale is not None and training_args.do_eval and "validation" in tokenized:
            run.add_unscaled("validation", trainer.predict(tokenized["validation"], metric_key_prefix="unscaled"))
    run.scale()
    if method_args.temperature_scaling:
        run.calibrate()
    run.settle_decisions()
    for prefix, split in cli.asked_splits(training_args, tokenized):
        output = trainer.predict(tokenized[split], metric_key_prefix=prefix)
        run.add_predictions(prefix, split, output, data.inputs(split))
        for name, rows in shifted.items() if split == "validation" else ():
            run.add_shift(name, output, trainer.predict(rows, metric_key_prefix=f"ood_{name}"))
        if split == "validation" and data_args.compare_lora and cli.is_comparable(route, trainer):
            set_seed(training_args.seed)
            lora = cli.find_route("lora")
            rival = make_trainer(adapted_model(lora), cli.rival_arguments(training_args), route=lora)
            rival.train()
            rival_output = rival.predict(tokenized[split], metric_key_prefix="lora")
            run.add_comparison(output, rival_output, data.texts(split), data.label_names)
    run.finish()


if __name__ == "__main__":
    with cli.user_errors():
        main()
