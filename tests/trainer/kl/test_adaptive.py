"""The adaptive schedule against pandas' running mean: in trainings, resumed ones, of both kinds of model."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers.models import TARGETS, tiny_gpt2
from helpers.training import arguments, blob_bert
from helpers.training import trainer as make_trainer

from blob_hf import BlobConfig, get_blob_model
from blob_hf.trainer.kl.adaptive import AT_NLL, AdaptiveSchedule
from blob_hf.trainer.kl.rate import PUBLISHED_RATE, default_pull
from blob_hf.trainer.kl.state import plan_kl
from blob_hf.trainer.kl.verdict import judge


def expected_weights(nlls, cycle):
    """pi_t of steps 1, 2, ... from the NLLs of the steps before, by pandas."""
    running = pd.Series(nlls).ewm(alpha=0.1, adjust=False).mean()
    return [0.0, *(math.exp((0.4 - value) / 0.2) / cycle for value in running[:-1])]


def test_the_weight_is_that_of_the_running_mean_of_the_steps_before(tmp_path):
    run = make_trainer(tmp_path, max_steps=12, kl_cycle_steps=None, gradient_accumulation_steps=2, logging_steps=5)
    run.train()
    history = pd.DataFrame(run.kl.history.rows)
    assert run.kl.schedule.name == "adaptive" and len(history) == 12
    expected = expected_weights(history["nll"], run.kl.schedule.cycle_steps)
    assert history["kl_weight"].tolist() == pytest.approx(expected, rel=1e-9)
    assert history["kl_weight"][0] == 0 and history["kl_weight"].nunique() == 12


def test_a_run_that_learns_is_held_the_more(tmp_path):
    """A hundred steps on eight rows: the network memorises them, and the KL grows by what the NLL falls."""
    run = make_trainer(tmp_path, data=None, max_steps=80, kl_cycle_steps=None, kl_pull=1e-6, learning_rate=3e-2)
    run.train()
    history = pd.DataFrame(run.kl.history.rows)
    assert history["nll"].tail(10).mean() < 0.2 < 1 < history["nll"].head(3).mean()
    weights = history["kl_weight"] * run.kl.schedule.cycle_steps
    assert weights[3] < 0.1 and weights.iloc[-1] > 2.5  # at 1 nat exp(-3), at 0.2 e
    held = make_trainer(tmp_path / "held", max_steps=80, kl_cycle_steps=None, kl_pull=2.0, learning_rate=3e-2)
    held.train()
    assert pd.DataFrame(held.kl.history.rows)["nll"].tail(10).mean() > history["nll"].tail(10).mean() + 0.1


def test_at_its_nll_the_weight_is_the_uniform_one():
    schedule = AdaptiveSchedule(cycle_steps=50, total_steps=100)
    assert schedule(1) == 0
    rows = [{"nll": AT_NLL}]
    schedule.observe(rows)
    assert schedule(2) == pytest.approx(1 / 50) and schedule.strength == pytest.approx(1)
    schedule.observe(rows)  # nothing new
    assert schedule(3) == schedule(2)
    schedule.observe([*rows, {"nll": 0.0}])
    assert schedule.strength == pytest.approx(math.exp(0.04 / 0.2))


def test_a_network_that_knows_nothing_has_next_to_no_kl():
    schedule = AdaptiveSchedule(1, 1)
    schedule.observe([{"nll": math.log(77)}])
    assert schedule.strength < 1e-7


@pytest.mark.parametrize("save_steps", [3, 4])
def test_it_goes_on_exactly_after_a_checkpoint(tmp_path, save_steps):
    settings = {"max_steps": 8, "kl_cycle_steps": None, "save_strategy": "steps", "save_steps": save_steps}
    settings |= {"logging_steps": 2}  # 3 falls between two logs
    whole = make_trainer(tmp_path / "whole", blob_bert(), **settings)
    whole.train()
    again = make_trainer(tmp_path / "again", blob_bert(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{save_steps}"))
    assert again.kl.history.rows == whole.kl.history.rows
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert not a.requires_grad or torch.equal(a, b), name
    logs = [[row["nll"] for row in run.state.log_history if "nll" in row] for run in (whole, again)]
    assert len(logs[0]) == 4 and logs[0] == logs[1]


def test_the_log_has_the_means_since_the_log_before_whatever_was_evaluated_or_saved_between(tmp_path):
    run = make_trainer(
        tmp_path, max_steps=6, kl_cycle_steps=None, logging_steps=3, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    run.train()
    nlls = [row["nll"] for row in run.kl.history.rows]
    logged = [row["nll"] for row in run.state.log_history if "nll" in row]
    assert logged == pytest.approx([sum(nlls[:3]) / 3, sum(nlls[3:]) / 3])


def test_the_preflight_says_what_it_follows(tmp_path, caplog):
    run = make_trainer(tmp_path, kl_cycle_steps=None, kl_pull=0.5)
    with caplog.at_level("INFO", logger="blob_hf"):
        run.train()
    assert "KL follows the training NLL over 4 steps: 7 times as strong at 0 nats as at 0.4" in caplog.text
    assert "(from the pull 0.5)" in caplog.text


@pytest.mark.parametrize(
    ("changes", "schedule", "origin"),
    [
        ({}, "uniform", "pull"),
        ({"kl_schedule": "adaptive"}, "adaptive", "pull"),
        ({"kl_schedule": "adaptive", "kl_learning_rate": 0.01}, "adaptive", "given"),
        ({"kl_cycle_steps": 7}, "geometric", "published"),
    ],
)
def test_a_language_model_has_the_even_one_unless_told_otherwise(tmp_path, changes, schedule, origin):
    model = get_blob_model(tiny_gpt2(), BlobConfig(target_modules=TARGETS["gpt2"], task_type="CAUSAL_LM"))
    args = arguments(tmp_path, **{"kl_cycle_steps": None, **changes})
    found, diagnosis = plan_kl(args, 100, 8, 20, model, model.blob_config, 1e-3, 0.01)
    assert (found.name, diagnosis.rate.origin) == (schedule, origin)


def test_its_rate_is_the_pulls_at_its_nll(tmp_path):
    run = make_trainer(tmp_path, kl_cycle_steps=None, learning_rate=1e-2)
    run.train()
    expected = default_pull(24, 8.0) * 0.2 * 1e-2 * run.kl.schedule.cycle_steps
    assert run.kl.step.kl_learning_rate == pytest.approx(expected) != PUBLISHED_RATE


def test_the_verdict_on_a_run_that_has_not_learned_says_what_the_kl_waits_for(tmp_path):
    run = make_trainer(tmp_path, kl_cycle_steps=None, learning_rate=1e-5, max_steps=3)
    run.train()
    run.judge_kl()
    figures = replace(run.kl_verdict.figures, exposure=1.0, std_by_kl_alone=2.0)
    found = judge(figures, sample_gap=0.0)
    assert found.name == "deterministic" and "training NLL is still 1." in found.reason and "train longer" in str(found)
    assert "train longer" not in str(judge(replace(figures, nll_end=0.3), sample_gap=0.0))
    assert "train longer" not in str(judge(replace(figures, schedule="uniform"), sample_gap=0.0))
