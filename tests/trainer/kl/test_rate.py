"""The pull: what it means in steps, and that it brings the posterior to the same place whatever the cycle is."""

import math

import pytest
import torch
from helpers.training import blob_bert
from helpers.training import trainer as make_trainer

from blob_hf import BlobTrainingArguments
from blob_hf.trainer.kl.diagnosis import LEAST_EXPOSURE
from blob_hf.trainer.kl.rate import PUBLISHED_RATE, default_pull, pull_of_rate, rate_from_pull
from blob_hf.trainer.kl.schedule import KL_SCHEDULES, KLSchedule, kl_cycle_length
from blob_hf.trainer.kl.step import DecoupledKLStep, descend_mean, descend_rho
from blob_hf.tuner.kl import gaussian_kl
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.utils.errors import BlobError

CYCLE = 8


@pytest.mark.parametrize("name", [name for name in KL_SCHEDULES if name != "none"])
def test_at_a_pull_of_1_a_mean_at_one_prior_std_moves_by_the_learning_rate(name):
    """By the definition: averaged over whole cycles, the SGD step on gaussian_kl itself, by autograd."""
    schedule = KLSchedule(name, CYCLE, num_examples=100, total_steps=50 * CYCLE, weight=0.3)
    rate = rate_from_pull(1.0, schedule, learning_rate=1e-3, prior_std=0.2)
    mean = torch.tensor([0.2], requires_grad=True)
    (gradient,) = torch.autograd.grad(gaussian_kl(mean, torch.tensor([0.1]), 0.2), mean)
    steps = [rate * schedule(step) * gradient.item() for step in range(10 * CYCLE + 1, 20 * CYCLE + 1)]
    # a geometric cycle's weights sum to 1 - 1 / (2^(M+1) - 1)
    assert sum(steps) / len(steps) == pytest.approx(1e-3, rel=2 / 2**CYCLE)
    assert pull_of_rate(rate, schedule, 1e-3, 0.2) == pytest.approx(1.0)


@pytest.mark.parametrize("gamma", [4.0, 8.0, 12.0])
@pytest.mark.parametrize("num_examples", [60, 2490])
def test_the_default_pull_is_what_the_published_rate_comes_to_at_the_published_batch(num_examples, gamma):
    """By the formula of M itself; its int() and its least of one step are the difference."""
    cycle = kl_cycle_length(num_examples, gamma, 32)
    published = pull_of_rate(PUBLISHED_RATE, KLSchedule("geometric", cycle), 5e-4, 0.2)
    assert default_pull(num_examples, gamma) == pytest.approx(published, rel=1 / cycle)


def test_a_schedule_without_kl_has_no_rate():
    assert rate_from_pull(1.0, KLSchedule("none"), 1e-3, 0.2) == 0
    assert rate_from_pull(1.0, KLSchedule("constant", weight=0.0), 1e-3, 0.2) == 0


def test_adam_against_the_kl_comes_to_rest_a_prior_std_over_the_pull_from_0():
    """A constant gradient: Adam's steps have the size of the learning rate, the KL's grow with the mean."""
    mean, lr, prior_std, pull = torch.nn.Parameter(torch.zeros(1)), 1e-3, 0.2, 2.0
    rate = rate_from_pull(pull, KLSchedule("uniform", CYCLE), lr, prior_std)
    adam = torch.optim.Adam([mean], lr=lr)
    for _ in range(1500):
        mean.grad = torch.full_like(mean, -1.0)
        adam.step()
        with torch.no_grad():
            mean.copy_(descend_mean(mean, rate / CYCLE, prior_std))
    assert mean.item() == pytest.approx(prior_std / pull, rel=0.02)


@pytest.mark.parametrize("parameterization", ["square", "softplus"])
def test_the_kl_step_alone_comes_to_rest_at_the_prior(parameterization):
    """The equilibrium std of the KL step alone is sigma_p in closed form: there dKL/dOmega = 0."""
    rho = torch.tensor([0.05 if parameterization == "square" else -6.0], dtype=torch.float64)
    for _ in range(20000):
        rho = descend_rho(rho, 2e-3 if parameterization == "softplus" else 2e-4, 0.2, parameterization)
    std = rho.square() if parameterization == "square" else torch.nn.functional.softplus(rho)
    assert std.item() == pytest.approx(0.2, rel=1e-3)


def test_far_below_the_prior_a_square_std_rises_by_4_times_the_rate(tmp_path):
    """d(G^2)/dt = 2 G * 2 / G = 4, per unit of rate (docs/kl.md)."""
    rho = torch.tensor([0.05], dtype=torch.float64)
    stepped = descend_rho(rho, 1e-6, 0.2, "square")
    assert ((stepped.square() - rho.square()) / 1e-6).item() == pytest.approx(4.0, rel=0.01)


def test_auto_is_the_rate_of_the_pull_and_the_preflight_says_so(tmp_path, caplog):
    run = make_trainer(tmp_path, kl_pull=0.5, kl_cycle_steps=2, learning_rate=1e-2)
    with caplog.at_level("INFO", logger="blob_hf"):
        run.train()
    expected = 0.5 * 0.2 * 1e-2 * 2
    assert run.kl.step.kl_learning_rate == pytest.approx(expected)
    assert f"KL rate {expected:.3g} (from the pull 0.5)" in caplog.text


def test_without_a_pull_it_is_the_default_for_these_rows(tmp_path):
    run = make_trainer(tmp_path, kl_cycle_steps=None, learning_rate=1e-2)
    run.train()
    assert run.kl.schedule.name == "adaptive" and run.kl.diagnosis.rate.pull == pytest.approx(default_pull(24, 8.0))


def test_a_given_rate_is_taken_and_its_pull_shown(tmp_path):
    run = make_trainer(tmp_path, kl_learning_rate=PUBLISHED_RATE, kl_cycle_steps=2, learning_rate=1e-2)
    run.train()
    assert run.kl.step.kl_learning_rate == PUBLISHED_RATE
    assert run.kl.diagnosis.rate.pull == pytest.approx(PUBLISHED_RATE / 2 / (0.2 * 1e-2))
    assert "(given; a pull of 0.5)" in str(run.kl.diagnosis)


def test_the_preflight_foresees_where_the_kl_alone_takes_the_stds(tmp_path):
    """Against the optimizer's own hook, in a run whose NLL moves nothing."""
    run = make_trainer(tmp_path, max_steps=12, kl_cycle_steps=3, warmup_steps=3)
    run.train()
    foreseen = run.kl.diagnosis.rate
    model = blob_bert()
    layers = list(gaussian_layers(model).values())
    for layer in layers:
        layer.set_std(torch.full_like(layer.weight, foreseen.std_start))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    step = DecoupledKLStep(optimizer, model, 0.2, "square", foreseen.value)
    for group in optimizer.param_groups:
        group["initial_lr"] = 1.0
    for row in run.kl.history.rows:
        step.weight = row["kl_weight"]
        for group in optimizer.param_groups:
            group["lr"] = row["lr_scale"]
        optimizer.step()  # no gradients: the KL alone
    assert layers[0].std[0, 0].item() == pytest.approx(foreseen.std_by_kl_alone, rel=1e-4)


def test_a_run_too_short_to_be_heard_is_warned_of(tmp_path, caplog):
    run = make_trainer(tmp_path, max_steps=4, learning_rate=5e-5)
    run.train()
    assert "the KL will move the stds little" in caplog.text and "kl_pull" in caplog.text
    caplog.clear()
    make_trainer(tmp_path, max_steps=30, learning_rate=3e-2).train()
    assert "little" not in caplog.text


def test_a_small_weight_that_the_rate_makes_good_for_is_not_warned_of(tmp_path, caplog):
    """gamma 2 gives a cycle of thousands of steps: 30 of them apply little of the KL's weight, but all of its pull."""
    run = make_trainer(
        tmp_path, max_steps=30, learning_rate=3e-2, kl_cycle_steps=None, gamma=2.0, kl_pull=1.0, kl_schedule="uniform"
    )
    run.train()
    assert run.kl.diagnosis.exposure < LEAST_EXPOSURE and not run.kl.diagnosis.warnings
    assert run.kl.diagnosis.rate.std_by_kl_alone > 0.1


def test_what_is_neither_a_number_nor_auto_is_refused(tmp_path):
    with pytest.raises(BlobError, match="kl_learning_rate must be a number or auto, got 'fast'"):
        BlobTrainingArguments(str(tmp_path), kl_learning_rate="fast")
    with pytest.raises(BlobError, match="kl_learning_rate must be >= 0, got -1"):
        BlobTrainingArguments(str(tmp_path), kl_learning_rate=-1)
    with pytest.raises(BlobError, match="kl_pull must be >= 0"):
        BlobTrainingArguments(str(tmp_path), kl_pull=-1.0)
    assert BlobTrainingArguments(str(tmp_path), kl_learning_rate="0.01").kl_learning_rate == 0.01


def test_the_published_runs_have_the_pulls_that_the_documentation_names():
    """Llama-2: rate 0.01, lr 1e-4, M = 394; RoBERTa: 0.002, 5e-4, M = 67 (reference settings)."""
    llama = pull_of_rate(0.01, KLSchedule("geometric", 394), 1e-4, 0.2)
    roberta = pull_of_rate(0.002, KLSchedule("geometric", 67), 5e-4, 0.2)
    assert llama == pytest.approx(1.27, abs=0.01) and roberta == pytest.approx(0.30, abs=0.01)
    assert math.isclose(rate_from_pull(llama, KLSchedule("geometric", 394), 1e-4, 0.2), 0.01)
