"""The flags of transformers' example scripts, one by one, and what is typed against what is a default."""

import dataclasses
import importlib
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.models import tiny_bart, tiny_bert, tiny_roberta
from transformers import DataCollatorForSeq2Seq, IntervalStrategy

from blob_hf import BlobError, BlobModel, cli
from blob_hf.cli.adapters import AdapterArguments
from blob_hf.cli.arguments import _Parser
from blob_hf.cli.flags import REFUSED, RENAMED, explain
from blob_hf.cli.folders import SETTINGS_FILE, release_locks
from blob_hf.cli.head import head_targets, settle_head
from blob_hf.cli.published import with_kl_rate
from blob_hf.data import demo
from blob_hf.trainer.training_args import BlobTrainingArguments

_MODEL = (
    "model_name_or_path config_name tokenizer_name cache_dir use_fast_tokenizer model_revision token trust_remote_code"
)
_FILES = "train_file validation_file test_file"
_ROWS = (
    "overwrite_cache pad_to_max_length preprocessing_num_workers max_train_samples max_eval_samples max_predict_samples"
)
# transformers' own flags by script; run_glue_blob.py stands for two of them
FLAGS = {
    "run_glue_blob": (
        f"{_MODEL} ignore_mismatched_sizes task_name dataset_name dataset_config_name {_FILES} max_seq_length {_ROWS} "
        "shuffle_train_dataset shuffle_seed text_column_names label_column_name text_column_delimiter do_regression "
        "metric_name remove_splits remove_columns train_split_name validation_split_name test_split_name "
        "overwrite_output_dir use_auth_token"
    ).split(),
    "run_summarization_blob": (
        f"{_MODEL} lang dataset_name dataset_config_name text_column summary_column {_FILES} {_ROWS} "
        "max_source_length max_target_length val_max_target_length num_beams ignore_pad_token_for_loss source_prefix "
        "forced_bos_token resize_position_embeddings overwrite_output_dir use_auth_token"
    ).split(),
}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "flags.md"


def types(script):
    module = importlib.import_module(script)
    return (module.ModelArguments, module.DataArguments, cli.MethodArguments, module.TrainingArguments), module.DEMO


def parse(script, *argv):
    return cli.parse_arguments(*types(script), "", ["--use_cpu", "true", "--report_to", "none", *argv])


def documented(script):
    section = next(part for part in DOCS.read_text().split("\n## ") if script in part.splitlines()[0])
    return dict(re.findall(r"^\| `--(\w+)` \| (.+) \|$", section, re.MULTILINE))


@pytest.mark.parametrize("script", FLAGS)
def test_every_flag_is_what_the_documentation_says(script):
    table = documented(script)
    assert list(table) and sorted(table) == sorted(FLAGS[script])
    parser = _Parser(list(types(script)[0]))
    actions = {option: action for action in parser._actions for option in action.option_strings}
    for name, status in table.items():
        if status.startswith("works"):
            assert actions[f"--{name}"].dest == name, name
        elif alias := re.match(r"alias of `--(\w+)`", status):
            assert actions[f"--{name}"].dest == alias[1], name
            assert actions[f"--{name.replace('_', '-')}"].dest == alias[1], name
        else:
            assert status.startswith("refused: ") and f"--{name}" not in actions, name
            with pytest.raises(BlobError, match=rf"there is no --{name}.*: .{{8}}"):
                parse(script, f"--{name}", "x")


def test_what_replaces_a_flag_exists():
    options = _Parser(list(types("run_glue_blob")[0])).options
    for name, instead in RENAMED.items():
        assert f"--{name}" not in options and instead.split()[0] in options, name
    for name, reason in REFUSED.items():
        for flag in re.findall(r"--\w+", reason):
            if flag != "--max_source_length":  # the summarizer's
                assert flag in options, (name, flag)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gama", "8"], "unknown flag --gama: did you mean --gamma?"),
        (["--lerning_rate=1"], "unknown flag --lerning_rate: did you mean --learning_rate?"),
        (["-beta", "0.2"], "unknown flag -beta: did you mean --beta?"),
        (["--evaluation_strategy", "steps"], "there is no --evaluation_strategy: use --eval_strategy"),
        (["--no_cuda"], "there is no --no_cuda: use --use_cpu"),
        (["--per_gpu_train_batch_size", "8"], "use --per_device_train_batch_size"),
        (["--lr", "1e-3"], "there is no --lr: use --learning_rate"),
        (["--overwrite_output_dir"], "choose another --output_dir"),
        (["--qqqq"], "unknown flag --qqqq: --help lists the flags"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_unknown_flags_are_answered(argv, message):
    with pytest.raises(BlobError) as error:
        parse("run_glue_blob", *argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_explain_prefers_what_exists():
    assert explain("--use_auth_token", {"--token"}) == "there is no --use_auth_token: use --token"
    assert "did you mean" not in explain("--use_auth_token", {"--seed"})


# ----- what is typed, what is a default --------------------------------------------------------------------------


@pytest.mark.parametrize("script", FLAGS)
def test_epochs_switch_the_published_steps_off_and_the_log_says_so(script, caplog):
    for start in ([], ["--demo"]):
        model, data, _, args = parse(script, *start, "--num_train_epochs", "1")
        assert (args.max_steps, args.num_train_epochs) == (-1, 1.0)
    model, data, _, args = parse(script, "--num_train_epochs", "1")
    with caplog.at_level(logging.INFO, "blob_hf"):
        assert with_kl_rate(args, model, data).kl_learning_rate == "auto"  # no published experiment
    assert "training for 1 epochs" in caplog.text
    assert parse(script, "--num_train_epochs", "1", "--max_steps", "7")[3].max_steps == 7
    assert parse(script)[3].max_steps in (5000, 12500)


def test_what_is_typed_wins_over_defaults():
    args = parse("run_glue_blob", "--warmup_ratio", "0.1", "--logging_strategy", "epoch", "--eval_steps", "30")[3]
    assert (args.warmup_steps, args.logging_strategy) == (0.1, IntervalStrategy.EPOCH)
    assert (args.eval_strategy, args.eval_steps) == (IntervalStrategy.STEPS, 30)
    args = parse("run_glue_blob", "--load_best_model_at_end", "--metric_for_best_model", "ece", "--eval_steps", "7")[3]
    assert (args.save_steps, args.eval_steps, args.greater_is_better) == (7, 7, False)
    args = parse("run_glue_blob", "--load_best_model_at_end", "--eval_strategy", "epoch")[3]
    assert args.save_strategy == args.eval_strategy == "epoch"
    assert parse("run_glue_blob", "--kl_weight", "0.1")[3].kl_schedule == "constant"
    assert parse("run_glue_blob", "--kl_target_nats_per_weight", "1")[3].kl_schedule == "target"
    data = parse("run_summarization_blob", "--generation_num_beams", "4", "--generation_max_length", "61")[1]
    assert (data.num_beams, data.max_new_tokens) == (4, 60)
    data = parse("run_summarization_blob", "--generation_num_beams", "4", "--num_beams", "2")[1]
    assert data.num_beams == 2
    assert parse("run_summarization_blob", "--source_prefix", "sum: ")[1].prompt == "sum: {dialogue}"
    with pytest.raises(BlobError, match="give one of them"):
        parse("run_summarization_blob", "--source_prefix", "a", "--prompt", "b{dialogue}")


def test_a_config_alone_is_an_untrained_model_and_with_a_model_it_is_the_models():
    assert parse("run_summarization_blob", "--demo", "--config_name", "bart")[0].model_name_or_path is None
    model = parse("run_summarization_blob", "--config_name", "bart", "--model_name_or_path", "m")[0]
    assert model.model_name_or_path == "m"
    assert parse("run_glue_blob", "--config_name", "c")[0].model_name_or_path == "roberta-base"


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("run_glue_blob", ["--metric_for_best_model", "f1"], "must be one of loss, mean_nll, nll, .*ece.*, got 'f1'"),
        ("run_summarization_blob", ["--metric_for_best_model", "mean_rouge1"], "nll_sample_std, got 'mean_rouge1'"),
        ("run_glue_blob", ["--preprocessing_num_workers", "0"], "must be >= 1, got 0"),
        ("run_summarization_blob", ["--val_max_target_length", "0"], "must be >= 1, got 0"),
        ("run_summarization_blob", ["--ignore_pad_token_for_loss", "false"], "train on padding"),
    ],
)
def test_values_that_make_no_sense(script, argv, message):
    with pytest.raises(BlobError, match=message):
        cli.check_best_metric(parse(script, *argv)[3])


# ----- rows ------------------------------------------------------------------------------------------------------


def test_rows_are_shuffled_before_the_first_are_taken():
    rows = Dataset.from_dict({"x": list(range(50))})
    args = cli.RowArguments(max_train_samples=5, max_predict_samples=3, shuffle_train_dataset=True, shuffle_seed=1)
    assert args.chosen(rows, "train")["x"][:] == rows.shuffle(seed=1)["x"][:5]
    assert args.chosen(rows, "test")["x"][:] == [0, 1, 2] and len(args.chosen(rows, "validation")) == 50
    assert cli.split_names(["a,b"]) == cli.split_names(["a", "b"]) == cli.split_names(["a,", "b"]) == ["a", "b"]


def test_fixed_lengths_change_no_prediction():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.BACKBONE_DIR)
    rows = [{**tokenizer(text), "labels": tokenizer(text[:3]).input_ids} for text in ("a b c", "hello", "one two")]
    torch.manual_seed(0)
    model = tiny_bart(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    collator = DataCollatorForSeq2Seq(tokenizer)
    short, fixed = collator([dict(row) for row in rows]), cli.FixedLengths(collator, tokenizer, 24, 9)(rows)
    assert fixed["input_ids"].shape == (3, 24) and fixed["labels"].shape == (3, 9)
    kept = short["labels"].shape[1]
    assert (fixed["labels"][:, :kept] == short["labels"]).all() and (fixed["labels"][:, kept:] == -100).all()
    with torch.no_grad():
        losses = [
            model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
            for batch in (short, fixed)
        ]
    torch.testing.assert_close(losses[0], losses[1])


# ----- the head --------------------------------------------------------------------------------------------------


def test_auto_trains_the_head_on_own_data_alone(caplog):
    auto = AdapterArguments()
    with caplog.at_level(logging.INFO, "blob_hf"):
        assert settle_head(auto, None).train_head == "true" and "trained in full" in caplog.text
        assert settle_head(auto, "rte").train_head == "auto" and "as published for rte" in caplog.text
    assert settle_head(AdapterArguments(target_modules=["query"]), None).train_head == "auto"
    assert settle_head(AdapterArguments(train_head="false"), None).train_head == "false"
    assert settle_head(auto, None, fresh=False) is auto


@pytest.mark.parametrize(("make", "head"), [(tiny_bert, "classifier"), (tiny_roberta, "classifier")])
def test_a_trained_head_is_trained_in_full_and_saved(tmp_path, make, head):
    base = make()
    targets, trained = head_targets(AdapterArguments(train_head="true"), base)
    assert targets == ["query", "value"] and trained is None  # PEFT finds this head
    base.save_pretrained(tmp_path / "base")
    adapter_args = AdapterArguments(train_head="true", model_revision="v2")
    args = BlobTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    route = cli.find_route("blob")
    model = cli.make_model(route, type(base).from_pretrained(tmp_path / "base"), adapter_args, cli.MethodArguments(),
                           args, "SEQ_CLS", None)  # fmt: skip
    weights = [name for name, p in model.named_parameters() if p.requires_grad and f".{head}." in name]
    assert weights and all("modules_to_save" in name for name in weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == "v2"
    again = BlobModel.from_pretrained(tmp_path / "adapter", model=type(base).from_pretrained(tmp_path / "base"))
    ids = torch.arange(4, 10)[None]
    with torch.no_grad(), model.eval().posterior_mean():
        expected = model(input_ids=ids).logits
    with torch.no_grad(), again.posterior_mean():
        torch.testing.assert_close(again(input_ids=ids).logits, expected)


def test_heads_that_peft_does_not_know_are_named():
    from transformers import BartForSequenceClassification

    base = BartForSequenceClassification(tiny_bart(num_labels=3).config)
    targets, trained = head_targets(AdapterArguments(train_head="true"), base)
    assert targets == ["q_proj", "v_proj"] and trained == ["classification_head"]
    assert "classification_head.dense" in head_targets(AdapterArguments(), base)[0]
    with pytest.raises(BlobError, match="--train_head true trains the whole head, but --target_modules names"):
        head_targets(AdapterArguments(train_head="true", target_modules=["classification_head.dense"]), base)
    with pytest.raises(BlobError, match="name its layers in --target_modules"):
        head_targets(AdapterArguments(train_head="false", target_modules=["q_proj"]), base)


# ----- the base model --------------------------------------------------------------------------------------------


def test_an_adapter_remembers_the_revision_of_its_base(tmp_path, monkeypatch):
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    own = type(base).from_pretrained(tmp_path / "base")
    args = BlobTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    given = AdapterArguments(model_revision="v2", target_modules=["query"])
    route = cli.find_route("blob")
    cli.make_model(route, own, given, cli.MethodArguments(), args, "SEQ_CLS", None).save_pretrained(tmp_path / "a")
    settled = cli.with_saved_revision(AdapterArguments(), str(tmp_path / "base"), str(tmp_path / "a"))
    assert settled.model_revision == "v2" and settled.hub()["revision"] == "v2"
    assert cli.with_saved_revision(AdapterArguments(), "another", str(tmp_path / "a")).model_revision is None
    assert cli.with_saved_revision(given, "another", str(tmp_path / "a")) is given
    asked, load = {}, type(base).from_pretrained
    monkeypatch.setattr(
        type(base), "from_pretrained", classmethod(lambda cls, name, **k: asked.update(k) or load(name, num_labels=3))
    )
    BlobModel.from_pretrained(tmp_path / "a")
    assert asked["revision"] == "v2"


def test_a_token_is_not_written_down(tmp_path):
    model, data, _, args = parse("run_glue_blob", "--token", "hf_secret", "--output_dir", str(tmp_path))
    cli.claim_output_dir(args, True, model, data).settle()
    assert "hf_secret" not in (tmp_path / SETTINGS_FILE).read_text()
    moved = dataclasses.replace(model, cache_dir="elsewhere")
    release_locks()
    cli.claim_output_dir(args, True, moved, data)  # loaded from elsewhere, the same run


def test_a_language_that_a_tokenizer_does_not_know_is_refused():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.BACKBONE_DIR)
    base = tiny_bart()
    with pytest.raises(BlobError, match="knows no languages"):
        cli.TextArguments(lang="en_XX").set_language(base, tokenizer)
    with pytest.raises(BlobError, match="--forced_bos_token <xyz> is no token"):
        cli.TextArguments(forced_bos_token="<xyz>").set_language(base, tokenizer)
    cli.TextArguments(forced_bos_token=tokenizer.eos_token).set_language(base, tokenizer)
    assert base.generation_config.forced_bos_token_id == tokenizer.eos_token_id
