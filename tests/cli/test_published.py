"""Which runs keep the published rate of the KL, and which get theirs from the pull."""

import importlib

import pytest
from helpers.training import arguments

from blob_hf import cli
from blob_hf.cli.published import with_kl_rate
from blob_hf.trainer.kl.rate import PUBLISHED_RATE

SCRIPTS = ["run_glue_blob", "run_summarization_blob"]


def settled(script, *flags):
    module = importlib.import_module(script)
    types = (module.ModelArguments, module.DataArguments, cli.MethodArguments, module.TrainingArguments)
    model, data, _, args = cli.parse_arguments(types, module.DEMO, "", ["--use_cpu", "true", *flags])
    return with_kl_rate(args, model, data)


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
    ],
)  # fmt: skip
def test_another_run_gets_its_rate_from_the_pull(script, flags):
    args = settled(script, *flags)
    assert args.kl_learning_rate == "auto" and args.rate_from_pull and args.schedule == "uniform"


@pytest.mark.parametrize(
    ("changes", "from_pull", "schedule"),
    [
        ({}, True, "uniform"),
        ({"kl_pull": 0.3}, True, "uniform"),
        ({"gamma": 12.0}, True, "uniform"),
        ({"kl_cycle_steps": 7}, False, "geometric"),
        ({"kl_schedule": "elbo"}, False, "elbo"),
        ({"kl_schedule": "constant", "kl_weight": 0.1}, False, "constant"),
        ({"kl_schedule": "geometric", "kl_pull": 0.3}, True, "geometric"),
        ({"kl_learning_rate": 0.01}, False, "geometric"),
    ],
)
def test_who_changes_the_kl_has_the_published_machinery(tmp_path, changes, from_pull, schedule):
    args = arguments(tmp_path, **{"kl_cycle_steps": None, **changes})
    assert (args.rate_from_pull, args.schedule) == (from_pull, schedule)


def test_a_rate_and_a_pull_contradict_each_other(tmp_path):
    with pytest.raises(cli.terminal.BlobError, match="give one of them"):
        arguments(tmp_path, kl_learning_rate=0.01, kl_pull=0.5)
