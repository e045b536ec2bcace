"""Which runs keep the published rate of the KL, and which get theirs from the pull."""

import importlib

import pytest
import torch
from helpers.training import arguments, blob_bert, rows, trainer

from blob_hf import BlobError, BlobTrainer, cli
from blob_hf.cli.published import with_kl_rate
from blob_hf.trainer.kl.rate import PUBLISHED_RATE

SCRIPTS = ["run_glue_blob", "run_summarization_blob"]


def settled(script, *flags):
    module = importlib.import_module(script)
    types = (module.ModelArguments, module.DataArguments, cli.MethodArguments, module.TrainingArguments)
    model, data, method, args = cli.parse_arguments(types, module.DEMO, "", ["--use_cpu", "true", *flags])
    return with_kl_rate(args, method, model, data)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "flags", [[], ["--beta", "0.2", "--gamma", "8"], ["--gamma", "12"], ["--seed", "3"], ["--eval_samples", "5"]]
)
def test_the_published_command_is_the_published_experiment(script, flags):
    args = settled(script, *flags)
    assert args.kl_learning_rate == PUBLISHED_RATE == 0.002
    assert not args.rate_from_pull and args.schedule == "geometric"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "flags",
    [
        ["--demo"], ["--demo", "--beta", "0.2", "--gamma", "8"], ["--max_steps", "300"], ["--learning_rate", "1e-3"],
        ["--train_file", "own.csv"], ["--model_name_or_path", "other"], ["--per_device_train_batch_size", "8"],
        ["--method", "scalabl"],
    ],
)  # fmt: skip
def test_another_run_gets_its_rate_from_the_pull(script, flags):
    args = settled(script, *flags)
    assert args.kl_learning_rate == "auto" and args.rate_from_pull and args.schedule == "adaptive"


def test_a_task_that_was_not_published_is_another_run():
    assert settled("run_glue_blob", "--task_name", "mrpc").kl_learning_rate == PUBLISHED_RATE
    for flags in (["--task_name", "sst2"], ["--dataset_name", "user/data"]):
        assert settled("run_glue_blob", *flags).rate_from_pull


@pytest.mark.parametrize(
    ("changes", "from_pull", "schedule"),
    [
        ({}, True, "adaptive"),
        ({"kl_pull": 0.3}, True, "adaptive"),
        ({"gamma": 12.0}, True, "adaptive"),
        ({"kl_cycle_steps": 7}, False, "geometric"),
        ({"kl_schedule": "elbo"}, False, "elbo"),
        ({"kl_schedule": "constant", "kl_weight": 0.1}, False, "constant"),
        ({"kl_schedule": "geometric", "kl_pull": 0.3}, True, "geometric"),
        ({"kl_learning_rate": 0.01}, False, "geometric"),
        ({"kl_schedule": "adaptive", "kl_cycle_steps": 7}, True, "adaptive"),
        ({"kl_schedule": "adaptive", "kl_learning_rate": 0.01}, False, "adaptive"),
    ],
)
def test_who_changes_the_kl_has_the_published_machinery(tmp_path, changes, from_pull, schedule):
    args = arguments(tmp_path, **{"kl_cycle_steps": None, **changes})
    assert (args.rate_from_pull, args.schedule) == (from_pull, schedule)


def test_a_rate_and_a_pull_contradict_each_other(tmp_path):
    with pytest.raises(BlobError, match="give one of them"):
        arguments(tmp_path, kl_learning_rate=0.01, kl_pull=0.5)


@pytest.mark.parametrize("varied", [["kl_pull"], ["kl_learning_rate"], ["learning_rate", "beta"]])
def test_a_search_over_the_rate_is_not_pinned_to_the_published_one(varied):
    module = importlib.import_module("run_glue_blob")
    types = (module.ModelArguments, module.DataArguments, module.TrainingArguments)
    model, data, args = cli.parse_arguments(types, module.DEMO, "", ["--use_cpu", "true"])
    assert with_kl_rate(args, model, data, varied=varied).kl_learning_rate == "auto"
    assert with_kl_rate(args, model, data, varied=["beta"]).kl_learning_rate == PUBLISHED_RATE


def test_the_rate_of_a_trial_is_a_number(tmp_path):
    """transformers casts a trial's value to the type of the default, which is a word here."""
    run = trainer(tmp_path, kl_cycle_steps=None, max_steps=2)
    run.args.kl_learning_rate = str(0.01)
    run.hp_search_backend, run.hp_space = None, None
    run._hp_search_setup = lambda trial: None
    run.model_init = lambda trial=None: blob_bert()
    run.call_model_init({"kl_learning_rate": 0.01})
    assert run.args.kl_learning_rate == 0.01 and not run.args.rate_from_pull


def test_the_pull_is_against_the_optimizers_learning_rate_whoever_made_it(tmp_path):
    model = blob_bert()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
    run = BlobTrainer(
        model, arguments(tmp_path, kl_cycle_steps=None, kl_pull=0.5, learning_rate=1e-4), train_dataset=rows(),
        optimizers=(optimizer, None),
    )  # fmt: skip
    run.train()
    cycle = run.kl.schedule.cycle_steps
    assert run.kl.step.kl_learning_rate == pytest.approx(0.5 * 0.2 * 0.3 * cycle)


@pytest.mark.parametrize(
    "changes", [{"kl_gradient": "loss"}, {"kl_schedule": "target", "kl_target_nats_per_weight": 1}]
)
def test_a_pull_that_nothing_would_read_is_refused(tmp_path, changes):
    with pytest.raises(BlobError, match="leave it out"):
        arguments(tmp_path, kl_cycle_steps=None, kl_pull=0.5, **changes)
    assert arguments(tmp_path, kl_cycle_steps=None, kl_gradient="loss").schedule == "geometric"
