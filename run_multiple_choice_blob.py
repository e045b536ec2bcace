#!/usr/bin/env python
"""Fine-tune a causal language model with BLoB (Bayesian LoRA), or one of its peers, to answer multiple choice.

The defaults are the paper's experiment on Llama-2: the answer is the letter after the prompt, the probabilities a
softmax over the letters. `--scoring text` compares the choices' texts instead, as small models need it. beta is the
standard deviation of the prior on A, gamma sets the period of the KL re-weighting cycle.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM, set_seed

from blob_hf import BlobTrainer, BlobTrainingArguments, cli
from blob_hf.cli.classifier_run import CLASSIFICATION_METRICS, ClassifierRun
from blob_hf.cli.evaluation import classification_metrics
from blob_hf.cli.questions import warn_of_unread_asking, width_note
from blob_hf.data.loading import FORMATS, first_rows, hold_out, named_file
from blob_hf.data.multiple_choice import PUBLISHED, TASKS, find_task, load_choices, require_answers, tokenize_choices
from blob_hf.inference.choices import (
    NORMALIZATIONS,
    SCORINGS,
    ChoiceCollator,
    ChoiceScoring,
    padding_token,
)
from blob_hf.tuner.adapter_files import resolve

PUBLISHED_KL_RATE = 0.01  # of the experiments on Llama


@dataclass
class ModelArguments(cli.AdapterArguments):
    """Which model, and which adapter on it."""

    model_name_or_path: str = field(
        default="meta-llama/Llama-2-7b-hf", metadata={"help": "Base model: Hub id or local folder."}
    )
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's alpha: its update is scaled by alpha / r."})


@dataclass
class DataArguments(cli.RowArguments):
    """Which questions, how many, and how they are asked."""

    task_name: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(TASKS)}. Default: arc_challenge, unless data is given."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Other data: Hub id, or folder of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": f"Columns question, choices, label: {FORMATS}."})
    validation_file: str | None = field(default=None, metadata={"help": "File to evaluate on."})
    test_file: str | None = field(
        default=None, metadata={"help": "File for --do_predict; without labels it is predicted, not scored."}
    )
    calibration_file: str | None = field(
        default=None,
        metadata={
            "help": "Rows for --temperature_scaling, --posterior_scale, --conformal_alpha, --early_stopping_patience. "
            "Default: --calibration_samples of the training rows, which are then not trained on."
        },
    )
    scoring: str = field(
        default="letter",
        metadata={"help": "letter: the answer's letter, as published. text: the choice's text.", "choices": SCORINGS},
    )
    length_normalization: str = field(
        default="none",
        metadata={"help": "Of --scoring text: divide log-likelihoods by their length.", "choices": NORMALIZATIONS},
    )
    max_length: int = field(default=300, metadata={"help": "Longest prompt in tokens; it loses its beginning."})
    ood_tasks: list[str] | None = field(
        default=None, metadata={"help": "Other tasks: does the uncertainty tell their questions from the own ones?"}
    )
    ood_file: list[str] | None = field(default=None, metadata={"help": "The same for files: path, or name=path."})


@dataclass
class TrainingArguments(cli.PublishedDefaults, BlobTrainingArguments):
    """transformers' and BLoB's training arguments with the published defaults."""

    per_device_train_batch_size: int = field(default=4, metadata={"help": "Batch size per device."})
    learning_rate: float = field(default=1e-4, metadata={"help": "AdamW's learning rate."})
    max_steps: int = field(default=5000, metadata={"help": "Optimizer steps."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false: the choices of a question are no inputs of the base model."}
    )


def main() -> None:
    types = (ModelArguments, DataArguments, cli.MethodArguments, TrainingArguments)
    model_args, data_args, method_args, training_args = cli.parse_arguments(types, {}, __doc__)
    cli.check_best_metric(training_args)
    cli.setup_logging(training_args.should_log)
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    files = {split: path for split, path in files.items() if path}
    dataset = (data_args.dataset_name, data_args.dataset_config_name) if data_args.dataset_name else None
    task_name = data_args.task_name or (None if files or dataset else "arc_challenge")
    training_args = cli.with_kl_rate(
        training_args, model_args, data_args, method_args, tasks=TASKS, rate=PUBLISHED_KL_RATE
    )
    route = cli.choose_route(model_args, method_args, training_args)
    route.check_run(method_args, training_args)
    cli.warn_of_ignored(route, method_args, training_args, model_args, data_args)

    # ----- data -----
    name = task_name or cli.name_of_files(files, {}, "questions")
    task = find_task(task_name) if task_name else None
    source = cli.data_source(
        name,
        files,
        (task.dataset, task.config) if task else None,
        (data_args.dataset_name, data_args.dataset_config_name),
    )
    folder = route.folder_name(source.name.replace(" ", "-"), training_args)
    training_args = cli.with_output_dir(training_args, folder, model_args.adapter_name_or_path)
    adapter = cli.starting_adapter(route, model_args, method_args, training_args)
    base_name = model_args.model_name_or_path
    model_args = cli.with_saved_revision(model_args, base_name, adapter)
    held_out_file = {"calibration": data_args.calibration_file} if data_args.calibration_file else {}
    splits = load_choices(task_name, {**files, **held_out_file}, dataset)
    if training_args.do_train:
        cli.require_split(splits, "train")
        require_answers(splits, "train")
    claim = cli.claim_output_dir(training_args, adapter is None, method_args, model_args, data_args)
    for split in splits:
        splits[split] = data_args.chosen(splits[split], split)
    holds_out = route.holds_out(method_args) and (training_args.do_train or bool(held_out_file))
    if holds_out:
        require_answers(splits, "calibration")
    if holds_out and "calibration" not in splits:
        hold_out(splits, method_args.calibration_samples)
    cli.hold_out_decisions(splits, route, method_args)
    shifted = {}
    for name in [*(data_args.ood_tasks or []), *(data_args.ood_file or [])]:
        title, path = named_file(name)
        other = load_choices(path)["validation"] if path in TASKS else load_choices(None, {"ood": path})["ood"]
        shifted[title] = first_rows(other, data_args.max_eval_samples)

    # ----- model -----
    set_seed(training_args.seed)
    config = model_args.load_config(base_name)
    tokenizer = model_args.load_tokenizer(base_name)
    asking = task.asking if task else PUBLISHED
    width = max(len(row) for rows in (*splits.values(), *shifted.values()) for row in rows["choices"])
    saved = None if adapter is None else ChoiceScoring.load(resolve(adapter))
    scoring = saved or ChoiceScoring.of(
        asking, data_args.scoring, width, tokenizer, data_args.length_normalization, data_args.max_length
    )
    scoring.check_width(width)
    warn_of_unread_asking(data_args, scoring, saved is not None)
    asked = {name: TASKS[name].asking if name in TASKS else scoring.asking for name in shifted}
    for name, other in asked.items():
        scoring.check_answers(other, name)

    def tokenize(rows, asking=scoring.asking):
        return tokenize_choices(
            rows, tokenizer, asking, scoring.scoring, scoring.max_length, scoring.normalization, **data_args.mapping()
        )

    tokenized = {split: tokenize(rows) for split, rows in splits.items()}
    outside = {
        name: tokenize(rows, TASKS[name].asking if name in TASKS else scoring.asking) for name, rows in shifted.items()
    }
    collator = ChoiceCollator(padding_token(tokenizer), scoring.scoring)

    def make_model(trial=None):
        base = model_args.load_model(AutoModelForCausalLM, base_name, config=config, dtype=model_args.dtype)
        model = cli.make_model(route, base, model_args, method_args, training_args, "CAUSAL_LM", adapter)
        model.set_companion(scoring)
        scoring.attach(model, Path())
        return model

    train_rows = tokenized.get("train") if training_args.do_train else None
    held_out = tokenized.get("calibration") if holds_out else None

    def make_trainer(model, args=training_args, model_init=None, route=route):
        args, callbacks = cli.early_stopping(route, args, method_args, len(train_rows or []))
        return BlobTrainer(
            model=model,
            args=route.arguments(args, train_rows),
            data_collator=collator,
            train_dataset=train_rows,
            eval_dataset=held_out if callbacks else tokenized.get("validation"),
            callbacks=callbacks,
            processing_class=tokenizer,
            compute_metrics=classification_metrics,
            point_estimate=route.name != "blob" and not model.has_posterior,
        )

    # ----- train, evaluate, report -----
    settings = {"max length": scoring.max_length, **scoring.settings()}
    trainer = make_trainer(make_model())
    decided_on = tokenized.get("conformal")
    job = cli.Job(training_args, method_args, make_model, make_trainer, held_out, decided_on)
    run = ClassifierRun(
        route, job, trainer, base_name, source, "multiple-choice", CLASSIFICATION_METRICS, settings,
        model_args.adapter_license,
    )  # fmt: skip
    if training_args.do_train:
        claim.settle()
        run.train()
    run.scale()
    if method_args.temperature_scaling:
        run.calibrate()
    run.settle_decisions()
    for prefix, split in cli.asked_splits(training_args, tokenized):
        output = trainer.predict(tokenized[split], metric_key_prefix=prefix)
        columns = [name for name in ("id", "question", "passage", "choices") if name in splits[split].column_names]
        run.add_predictions(prefix, split, output, splits[split].select_columns(columns).to_list())
        for name, rows in outside.items() if split == "validation" else ():
            run.add_shift(name, output, trainer.predict(rows, metric_key_prefix=f"ood_{name}"))
            if note := width_note(name, shifted[name], splits[split]):
                run.notes.append(note)
    run.finish()


if __name__ == "__main__":
    with cli.user_errors():
        main()
