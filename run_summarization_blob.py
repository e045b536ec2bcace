#!/usr/bin/env python
"""Fine-tune a summarizer with BLoB (Bayesian LoRA): BART on DialogSum, or any encoder-decoder on your own dialogues.

The defaults are the published experiment on BART-base (12,500 steps; the published grid over beta and gamma used
--max_steps 1500); `--demo` runs everything without network in about a minute.
beta is the standard deviation of the prior on A. gamma sets the period M of the KL re-weighting cycle,
M = int(100 * n**(pi/gamma) / global batch size): larger gamma, shorter cycle, more KL per step.
"""

from dataclasses import dataclass, field

from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, set_seed

from blob_hf import BlobError, BlobSeq2SeqTrainer, BlobSeq2SeqTrainingArguments, cli
from blob_hf.cli.answering import Answering
from blob_hf.cli.bases import config_from_name, kept_base
from blob_hf.cli.evaluation import rouge_compute_metrics, summaries_report
from blob_hf.cli.summarizer_run import SUMMARIZATION_METRICS, SummarizerRun
from blob_hf.data import demo
from blob_hf.data.loading import FORMATS, hold_out
from blob_hf.data.shifted_texts import load_shifted_texts
from blob_hf.data.summarization import (
    DEFAULT_PROMPT,
    Prompt,
    generation_rows,
    group_dialogues,
    load_summaries,
    scoring_rows,
    single_references,
)
from blob_hf.metrics.bertscore import PUBLISHED_MODEL, BertScorer
from blob_hf.metrics.similarity import rouge_utility

DEMO = {
    "model_name_or_path": str(demo.BACKBONE_DIR),
    "train_file": str(demo.SUMMARIZATION_FILES["train"]),
    "validation_file": str(demo.SUMMARIZATION_FILES["validation"]),
    "test_file": str(demo.SUMMARIZATION_FILES["test"]),
    "max_source_length": 192,
    "max_target_length": 48,
    "max_steps": 100,
    "learning_rate": 3e-3,
    "logging_steps": 10,
    "per_device_eval_batch_size": 20,
    "compare_base": True,
}


@dataclass
class ModelArguments(cli.AdapterArguments):
    """Which model, and which adapter on it."""

    model_name_or_path: str | None = field(
        default="facebook/bart-base", metadata={"help": "Base model: Hub id or local folder."}
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Config, if not the base model's; without --model_name_or_path an untrained base model is built "
            "from it, a model type (e.g. bart) or a folder."
        },
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to --config_name, for example d_model=256,encoder_layers=3."}
    )


@dataclass
class DataArguments(cli.TextArguments):
    """Which dialogues, how they are read and how summaries are written."""

    dataset_name: str | None = field(
        default="knkarthick/dialogsum", metadata={"help": "Hub dataset (ignored when files are given)."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": f"File to train on: {FORMATS}."})
    validation_file: str | None = field(default=None, metadata={"help": "File for --do_eval."})
    test_file: str | None = field(default=None, metadata={"help": "File for --do_predict."})
    calibration_file: str | None = field(
        default=None,
        metadata={
            "help": "Rows for --conformal_alpha, --posterior_scale and --early_stopping_patience. Default: "
            "--calibration_samples of the training rows, which are then not trained on."
        },
    )
    delimiter: str | None = field(default=None, metadata={"help": "Of csv files. Default: found in each file."})
    text_column: str = field(default="dialogue", metadata={"help": "Column of the dialogues."})
    summary_column: str = field(default="summary", metadata={"help": "Column of the reference summaries."})
    prompt: str = field(default=DEFAULT_PROMPT, metadata={"help": "What the model reads; {dialogue} is filled in."})
    max_source_length: int = field(default=512, metadata={"help": "Longest prompt in tokens (the dialogue is cut)."})
    max_target_length: int = field(default=128, metadata={"help": "Longest reference in tokens."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest summary. Default: max_target_length."})
    num_beams: int = field(default=1, metadata={"help": "Beams (published: 4 for the posterior mean, 1 for samples)."})
    length_penalty: float = field(default=1.0, metadata={"help": "Length penalty of beam search."})
    mbr_utility: str = field(
        default="rougeL",
        metadata={"help": "What --decoding mbr maximises.", "choices": ["rouge1", "rouge2", "rougeL", "bertscore"]},
    )
    ood_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Texts of another kind, path or name=path: does a summary's uncertainty tell them from the own?"
        },
    )
    bertscore_model: str = field(default=PUBLISHED_MODEL, metadata={"help": "Encoder for --mbr_utility bertscore."})
    compare_base: bool = field(default=False, metadata={"help": "Also evaluate the model as it was before training."})
    demo: bool = field(default=False, metadata={"help": "Run on embedded data and a tiny embedded model, no network."})


@dataclass
class TrainingArguments(cli.PublishedDefaults, BlobSeq2SeqTrainingArguments):
    """transformers' and BLoB's training arguments with the published defaults."""

    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size per device."})
    max_steps: int = field(default=12500, metadata={"help": "Optimizer steps."})


def main() -> None:
    parsed = cli.parse_arguments((ModelArguments, DataArguments, cli.MethodArguments, TrainingArguments), DEMO, __doc__)
    model_args, data_args, method_args, training_args = parsed
    cli.check_best_metric(training_args)
    cli.setup_logging(training_args.should_log)
    training_args = cli.with_kl_rate(training_args, method_args, model_args, data_args)
    route = cli.choose_route(model_args, method_args, training_args)
    route.check_run(method_args, training_args)
    cli.check_texts(route, method_args, training_args)
    cli.warn_of_ignored(route, method_args, training_args, model_args, data_args)

    data_args.warn_of_unused()

    # ----- data -----
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    files = {split: path for split, path in files.items() if path}
    prompt = Prompt(data_args.prompt)
    splits = load_summaries(
        data_args.dataset_name,
        data_args.dataset_config_name,
        files,
        data_args.text_column,
        data_args.summary_column,
        data_args.delimiter,
    )
    name = cli.name_of_files(files, DEMO, "demo dialogues")
    source = cli.data_source(name, files, None, (data_args.dataset_name, data_args.dataset_config_name))
    folder = route.folder_name(source.name.replace(" ", "-"), training_args)
    training_args = cli.with_output_dir(training_args, folder, model_args.adapter_name_or_path)
    adapter = cli.starting_adapter(route, model_args, method_args, training_args)
    model_args = cli.with_saved_revision(model_args, model_args.model_name_or_path, adapter)
    if training_args.do_train:
        cli.require_split(splits, "train")
    claim = cli.claim_output_dir(training_args, adapter is None, method_args, model_args, data_args)
    if training_args.do_train:
        splits["train"] = data_args.chosen(splits["train"], "train")
    columns = (data_args.text_column, data_args.summary_column)
    if route.holds_out(method_args) and data_args.calibration_file:
        rows = load_summaries(None, None, {"calibration": data_args.calibration_file}, *columns, data_args.delimiter)
        splits["calibration"] = rows["calibration"]
    elif route.holds_out(method_args) and training_args.do_train:
        hold_out(splits, method_args.calibration_samples)
    cli.hold_out_decisions(splits, route, method_args, classes=False)
    shifted = load_shifted_texts(data_args.ood_file or [], *columns, data_args.max_eval_samples)

    # ----- model -----
    set_seed(training_args.seed)
    base, tokenizer = load_base(model_args, data_args, training_args)

    def make_model():
        fresh = load_base(model_args, data_args, training_args)[0]
        return cli.make_model(route, fresh, model_args, method_args, training_args, "SEQ_2_SEQ_LM", adapter)

    # ----- rows: one per reference to train on and to score, one per dialogue to generate from -----
    positions = getattr(base.config, "max_position_embeddings", None) or data_args.max_source_length
    max_source_length = min(data_args.max_source_length, positions)
    lengths = (max_source_length, data_args.max_target_length)
    eval_lengths = (max_source_length, data_args.val_max_target_length or data_args.max_target_length)
    collator = DataCollatorForSeq2Seq(tokenizer, model=base)
    if data_args.pad_to_max_length:
        collator = cli.FixedLengths(collator, tokenizer, max_source_length, max(lengths[1], eval_lengths[1]))
    evaluated = [name for name in ("validation", "test") if name in splits]
    dialogues = {name: group_dialogues(splits[name], data_args.limit(name)) for name in evaluated}
    train_rows = None
    if training_args.do_train:
        train_rows = scoring_rows(single_references(splits["train"]), tokenizer, prompt, *lengths)
    held_out = None
    if "calibration" in splits:
        held_out = scoring_rows(single_references(splits["calibration"]), tokenizer, prompt, *lengths)
    decided_on = group_dialogues(splits["conformal"]) if "conformal" in splits else None
    referenced = {name: group for name, group in dialogues.items() if any(dialogue.references for dialogue in group)}
    scored = {name: scoring_rows(group, tokenizer, prompt, *eval_lengths) for name, group in referenced.items()}

    def make_trainer(model, args=training_args):
        args, callbacks = cli.early_stopping(route, args, method_args, len(train_rows or []))
        return BlobSeq2SeqTrainer(
            model=model,
            args=route.arguments(args, train_rows),
            data_collator=collator,
            train_dataset=train_rows,
            eval_dataset=held_out if callbacks else scored.get("validation"),
            callbacks=callbacks,
            processing_class=tokenizer,
            compute_metrics=rouge_compute_metrics(dialogues["validation"], tokenizer)
            if training_args.predict_with_generate and "validation" in dialogues and not callbacks
            else None,
            point_estimate=route.name != "blob" and not model.has_posterior,
        )

    trainer = make_trainer(make_model())
    utility = None
    if training_args.decoding == "mbr":
        is_bertscore = data_args.mbr_utility == "bertscore"
        utility = BertScorer(data_args.bertscore_model) if is_bertscore else rouge_utility(data_args.mbr_utility)
    decoding = {"num_beams": data_args.num_beams, "max_new_tokens": data_args.max_new_tokens or eval_lengths[1]}
    if data_args.num_beams > 1:
        decoding["length_penalty"] = data_args.length_penalty

    def evaluate(split: str, prefix: str) -> tuple[dict[str, float], list[dict]]:
        """Scores and ROUGE of one split, if it has references; their NLL is per token, over all of them."""
        group = dialogues[split]
        rows = generation_rows(group, tokenizer, prompt, max_source_length)
        output = trainer.predict(rows, metric_key_prefix=prefix, **decoding)
        metrics, predictions = summaries_report(output.predictions, group, tokenizer, training_args.decoding, utility)
        if split not in scored:
            return output.metrics or {}, predictions
        scores = trainer.score(scored[split], metric_key_prefix=prefix)
        return scores | {f"{prefix}_{name}": value for name, value in metrics.items()}, predictions

    # ----- train, evaluate, report -----
    base_name = model_args.model_name_or_path or model_args.config_name
    settings = {"prompt": repr(data_args.prompt), "max source, target": lengths, "decoding": decoding}
    answering = None
    if shifted or method_args.conformal_alpha is not None:
        chosen_by = {"utility": utility} if utility is not None else {}
        answering = Answering(trainer, tokenizer, data_args.prompt, max_source_length, {**decoding, **chosen_by})
    job = cli.Job(training_args, method_args, make_model, make_trainer, held_out)
    license = model_args.adapter_license
    run = SummarizerRun(
        route, job, trainer, base_name, source, "summarization", SUMMARIZATION_METRICS, settings, license
    )
    first_split = "validation" if "validation" in dialogues else "test"
    if data_args.compare_base and training_args.do_train and first_split in scored:
        metrics, _ = evaluate(first_split, "base")
        run.add_results("base", metrics, first_split, provisional=True)
    if training_args.do_train:
        claim.settle()
        run.train()
    run.scale()
    run.settle_decisions(answering, decided_on)
    for prefix, split in cli.asked_splits(training_args, dialogues):
        metrics, predictions = evaluate(split, prefix)
        run.add_summaries(prefix, split, metrics, predictions, scored=split in scored)
        if answering is not None:
            others = shifted if split == first_split else {}
            run.add_answers(answering, prefix, split, dialogues[split], predictions, others)
        run.write_summaries(prefix, split, predictions, dialogues[split])
    run.finish()


def load_base(model_args, data_args, training_args):
    """The base model and its tokenizer: pretrained, or untrained from a config (then kept in the run folder)."""
    name, config_name = model_args.model_name_or_path, model_args.config_name
    if name is None and model_args.tokenizer_name is None:
        raise BlobError("--config_name builds an untrained model: name its tokenizer with --tokenizer_name")
    tokenizer = model_args.load_tokenizer(name)
    if name is None:
        config = config_from_name(config_name, model_args.config_overrides, tokenizer)
        base = kept_base(config, tokenizer, training_args)
    else:
        own = {"config": model_args.load_config(name)} if config_name else {}
        base = model_args.load_model(AutoModelForSeq2SeqLM, name, dtype=model_args.dtype, **own)
    data_args.set_language(base, tokenizer)
    return base, tokenizer


if __name__ == "__main__":
    with cli.user_errors():
        main()
