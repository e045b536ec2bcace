"""The target schedule against bisection, and on posteriors that nothing else moves."""

import numpy as np
import pytest
import torch
from helpers.training import blob_bert
from helpers.training import trainer as make_trainer

from blob_hf.trainer.kl.step import DecoupledKLStep
from blob_hf.trainer.kl.target import TargetSchedule, rate_for_decrease
from blob_hf.tuner.posterior import gaussian_layers, kl_divergence
from blob_hf.utils.errors import BlobError


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
def test_the_rate_is_the_root_of_the_bounded_decrease(share):
    squared = torch.rand(200).double() ** 6 * 1e6  # few entries dominate
    available = torch.rand(200).double()
    wanted = share * available.sum()
    low, high = 0.0, 1e15
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.minimum(middle * squared, available).sum() < wanted else (low, middle)
    assert rate_for_decrease(squared, available, wanted) == pytest.approx(low, rel=1e-9)


def steered(parameterization, nats, time_constant=20, steps=200):
    """KL per weight over steps in which the KL step alone moves the posterior."""
    model = blob_bert(std_parameterization=parameterization)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    step = DecoupledKLStep(optimizer, model, 0.2, parameterization, kl_learning_rate=0.002)
    schedule = TargetSchedule(model, 0.2, parameterization, nats, 0.002, time_constant, steps)
    weights = sum(layer.weight.numel() for layer in gaussian_layers(model).values())
    course = []
    for t in range(1, steps + 1):
        course.append(kl_divergence(model, 0.2).item() / weights)
        step.weight = schedule(t)
        optimizer.step()
    return course, kl_divergence(model, 0.2).item() / weights


@pytest.mark.parametrize("parameterization", ["square", "softplus"])
@pytest.mark.parametrize("nats", [2.0, 0.5])
def test_the_kl_follows_its_course_to_the_target(parameterization, nats):
    course, end = steered(parameterization, nats)
    expected = nats + (course[0] - nats) * np.exp(-np.arange(200) / 20)
    # a step is of first order in the KL's gradient: a few percent of the 3 to 4 nats on the way, none at the end
    assert np.abs(np.array(course) - expected).max() < 0.15 * course[0]
    assert end == pytest.approx(nats, rel=0.02)


def test_below_the_target_there_is_no_kl():
    course, end = steered("square", 50.0, steps=5)
    assert course == [course[0]] * 5 and end == course[0]


def test_a_few_stds_next_to_zero_do_not_stop_the_others():
    model = blob_bert()
    layer = next(iter(gaussian_layers(model).values()))
    with torch.no_grad():
        layer.rho[0, :3] = 1e-7
    schedule = TargetSchedule(model, 0.2, "square", 1.0, 0.002, 1, 100)
    assert 1e-3 < schedule(1) < 1e3  # by the unbounded gradient it would be below 1e-8


def test_training_brings_the_kl_to_the_target_against_the_nll(tmp_path):
    model = blob_bert()
    run = make_trainer(
        tmp_path, model, max_steps=60, kl_cycle_steps=None, kl_schedule="target", kl_target_nats_per_weight=1.0
    )
    run.train()
    weights = sum(layer.weight.numel() for layer in gaussian_layers(model).values())
    # Adam at 1e-2 moves each G by up to 0.01 a step and the KL step takes that back: a tenth of a nat remains
    assert kl_divergence(model, 0.2).item() / weights == pytest.approx(1.0, abs=0.1)
    assert run.kl_verdict.figures.kl_per_weight == pytest.approx(1.0, abs=0.1) and run.kl.diagnosis.cycle_steps == 6
    assert "time constant of 6 of 60 steps" in str(run.kl.diagnosis)


def test_it_goes_on_exactly_after_a_checkpoint(tmp_path):
    settings = {"max_steps": 8, "kl_cycle_steps": 3, "kl_schedule": "target", "kl_target_nats_per_weight": 1.0}
    settings |= {"save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(tmp_path / "whole", blob_bert(), **settings)
    whole.train()
    again = make_trainer(tmp_path / "again", blob_bert(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.kl.history.rows == whole.kl.history.rows
    assert again.kl_verdict == whole.kl_verdict  # the stds of the very start are in the checkpoint
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert not a.requires_grad or torch.equal(a, b), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_schedule": "target"}, "need each other, got kl_schedule target and kl_target_nats_per_weight None"),
        ({"kl_target_nats_per_weight": 1.0}, "need each other, got kl_schedule auto"),
        ({"kl_schedule": "target", "kl_target_nats_per_weight": 0.0}, "must be > 0, got 0.0"),
        (
            {"kl_schedule": "target", "kl_target_nats_per_weight": 1.0, "kl_gradient": "loss"},
            "needs kl_gradient decoupled",
        ),
        (
            {"kl_schedule": "target", "kl_target_nats_per_weight": 1.0, "kl_learning_rate": 0.0},
            "kl_learning_rate > 0",
        ),
    ],
)
def test_bad_input(tmp_path, changes, message):
    with pytest.raises(BlobError, match=message):
        make_trainer(tmp_path, **changes)
