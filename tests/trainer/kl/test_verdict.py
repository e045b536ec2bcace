"""Verdicts at their thresholds, on figures, on synthetic posteriors, and on runs made to land in each."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.training import blob_bert
from helpers.training import trainer as make_trainer

from blob_hf import BlobError
from blob_hf.trainer.kl.schedule import KLSchedule
from blob_hf.trainer.kl.step import DecoupledKLStep
from blob_hf.trainer.kl.verdict import KLFigures, initial_stds, judge, measure, std_by_kl_alone
from blob_hf.tuner.layer import std_from_rho
from blob_hf.tuner.posterior import gaussian_layers, kl_divergence

HEALTHY = KLFigures(
    schedule="geometric", cycle_steps=50, steps=500, total_weight=10.0, exposure=5.0, std_by_kl_alone=20.0,
    mean_kl_loss=1.0, mean_elbo=1e4, num_weights=1000, kl_start=4000.0, kl_end=2000.0, prior_std=0.2, std_start=0.002,
    std_end=0.05, share_moved=1.0, std_to_mean=0.5,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "gap", "gain", "name"),
    [
        ({}, None, None, "healthy"),
        ({}, 0.2, None, "healthy"),
        ({"std_by_kl_alone": math.exp(0.049)}, None, None, "not applied"),
        ({"std_by_kl_alone": math.exp(0.051)}, None, None, "healthy"),
        ({"std_by_kl_alone": math.exp(-0.049)}, None, None, "not applied"),
        ({"std_by_kl_alone": math.exp(-0.051)}, None, None, "healthy"),
        ({"std_by_kl_alone": None, "exposure": 0.0099}, None, None, "not applied"),
        ({"std_by_kl_alone": None, "exposure": 0.0101}, None, None, "healthy"),
        # at the prior, the predictive decides: has the task been forgotten?
        ({"kl_end": 49.9}, 0.3, None, "prior collapse"),
        ({"kl_end": 49.9}, 0.3, -0.02, "prior collapse"),
        ({"kl_end": 49.9}, 0.3, 0.0099, "prior collapse"),
        ({"kl_end": 49.9}, 0.3, 0.0101, "healthy"),
        ({"kl_end": 50.1}, 0.3, -0.02, "healthy"),
        # what the samples predict decides, whatever std / mean is
        ({"std_to_mean": 0.0099}, None, None, "deterministic"),
        ({"std_to_mean": 5.0}, 0.0009, None, "deterministic"),
        ({"std_to_mean": 0.0099}, 0.0011, None, "healthy"),
        ({"std_to_mean": 0.001, "std_by_kl_alone": 1.0}, None, None, "not applied"),  # the cause goes first
        # what has diverged is nothing else, too
        ({"nll_start": 0.7, "nll_end": 1.69}, 0.2, None, "healthy"),
        ({"nll_start": 0.7, "nll_end": 1.71}, 0.2, None, "diverged"),
        ({"nll_start": 0.7, "nll_end": 1e9, "std_by_kl_alone": 1.0, "kl_end": 1.0}, 0.0, None, "diverged"),
        ({"nll_start": 0.7, "nll_end": 0.1, "std_end": math.nan}, 0.2, None, "diverged"),
        ({}, math.inf, None, "diverged"),
    ],
)
def test_thresholds(changes, gap, gain, name):
    verdict = judge(replace(HEALTHY, **changes), gap, lambda: gain)
    assert verdict.name == name and f"KL verdict: {name}" in str(verdict)
    assert verdict.to_dict()["verdict"] == name and verdict.to_dict()["sample_gap"] == gap


def test_a_predictive_that_is_worse_than_nothing_is_called_so():
    forgotten = replace(HEALTHY, kl_end=10.0)
    assert "it predicts 0.020 nats worse than without the task" in str(judge(forgotten, 0.3, lambda: -0.02))
    assert "it predicts 0.005 nats better than" in str(judge(forgotten, 0.3, lambda: 0.005))


def test_a_kl_that_waits_for_the_nll_is_not_told_to_take_what_it_has():
    """`kl_learning_rate auto` is what `adaptive` comes from, and M cancels in its rate."""
    unheard = replace(HEALTHY, schedule="adaptive", std_by_kl_alone=1.01, nll_start=4.3, nll_end=3.1)
    said = str(judge(unheard))
    assert "KL verdict: not applied" in said and "training NLL is still 3.10 nats" in said and "kl_pull" in said
    assert "gamma" not in said and "kl_cycle_steps" not in said
    assert "kl_cycle_steps" in str(judge(replace(unheard, schedule="geometric")))


def test_what_the_predictive_knows_is_measured_only_where_it_decides():
    def never():
        raise AssertionError("costs forwards")

    assert judge(HEALTHY, 0.2, never).name == "healthy"


def synthetic(mean, std, prior_std=0.2):
    """Figures of a model whose every A is N(mean, std^2), as a run with plenty of KL would leave it."""
    model = blob_bert()
    start = initial_stds(model)
    for layer in gaussian_layers(model).values():
        layer.weight.data.fill_(mean)
        layer.set_std(torch.full_like(layer.weight, std))
    row = {"nll": 1.0, "kl": 1.0, "kl_weight": 1.0, "kl_loss": 1.0, "elbo": 2.0, "lr_scale": 1.0}
    return measure(model, prior_std, "square", KLSchedule("uniform", 2), [row] * 3, start, 0.002), model


def test_figures_of_a_synthetic_posterior():
    found, model = synthetic(mean=0.05, std=0.1)
    assert found.kl_end == pytest.approx(kl_divergence(model, 0.2).item())
    assert found.kl_end / found.num_weights == pytest.approx(math.log(2) + (0.01 + 0.0025) / 0.08 - 0.5, rel=1e-5)
    assert found.std_end == pytest.approx(0.1, rel=1e-5) and found.std_to_mean == pytest.approx(2.0, rel=1e-5)
    assert found.share_moved == 1.0 and found.steps == 3 and found.exposure == 3.0
    assert found.std_start == pytest.approx(0.05**2 * 0.78, rel=0.1)  # G uniform in (eps / sqrt 2, eps)


@pytest.mark.parametrize(
    ("mean", "std", "name"),
    [
        (0.0, 0.2, "prior collapse"),
        (0.03, 0.18, "prior collapse"),
        (0.1, 0.2, "healthy"),
        (0.5, 0.004, "deterministic"),
    ],
)
def test_verdicts_of_synthetic_posteriors(mean, std, name):
    assert judge(synthetic(mean, std)[0]).name == name


def test_a_posterior_that_began_at_the_prior_is_judged_by_the_exposure():
    model = blob_bert()
    for layer in gaussian_layers(model).values():
        layer.set_std(torch.full_like(layer.weight, 0.2))
    row = {"nll": 1.0, "kl": 1.0, "kl_weight": 1.0, "kl_loss": 1.0, "elbo": 2.0, "lr_scale": 1.0}
    found = measure(model, 0.2, "square", KLSchedule("uniform", 2), [row] * 3, initial_stds(model), 0.002)
    assert found.std_by_kl_alone is None and judge(found).name != "not applied"
    never = replace(found, exposure=0.0)
    assert judge(never).name == "not applied"


def test_stds_that_stayed_are_not_counted_as_moved():
    model = blob_bert()
    start = initial_stds(model)
    layers = list(gaussian_layers(model).values())
    with torch.no_grad():
        layers[0].rho[:4] *= 1.04**0.5  # 4 %
        layers[0].rho[4:] *= 1.06**0.5  # 6 %: half of the layer's 8 rows
    row = {"nll": 1.0, "kl": 1.0, "kl_weight": 1.0, "kl_loss": 1.0, "elbo": 2.0, "lr_scale": 1.0}
    found = measure(model, 0.2, "square", KLSchedule("uniform", 2), [row], start, 0.002)
    # bfloat16 keeps the start to 0.4 %, so that 4 % and 6 % stay on their sides of 5 %
    assert found.share_moved == pytest.approx(layers[0].rho[4:].numel() / found.num_weights)


@pytest.mark.parametrize("parameterization", ["square", "softplus"])
@pytest.mark.parametrize("init_eps", [0.05, 0.9])
def test_the_kl_alone_is_what_the_kl_steps_do_without_an_nll(parameterization, init_eps):
    model = blob_bert(std_parameterization=parameterization, init_eps=init_eps)
    layers = gaussian_layers(model).values()
    for layer in layers:
        layer.set_std(torch.full_like(layer.weight, layer.std.mean().item()))
    start = next(iter(layers)).std[0, 0].item()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    step = DecoupledKLStep(optimizer, model, 0.2, parameterization, kl_learning_rate=0.002)
    schedule, rates = KLSchedule("geometric", 10), []
    for t in range(1, 31):
        optimizer.param_groups[-1]["lr"] = optimizer.param_groups[-2]["lr"] = 1 - t / 60
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", 1.0)
        step.weight = schedule(t)
        rates.append(0.002 * schedule(t) * step.lr_scale)
        optimizer.step()
    expected = next(iter(layers)).std[0, 0].item()
    assert std_by_kl_alone(start, 0.2, parameterization, rates) == pytest.approx(expected, rel=1e-4)
    assert std_from_rho(next(iter(layers)).rho, parameterization)[0, 0].item() == expected


# Runs that land in each: what a user would have to do for it.
RUNS = {
    "not applied": {"kl_cycle_steps": 500},
    "prior collapse": {"kl_pull": 500.0, "lr_scheduler_type": "constant", "max_steps": 40},
    "deterministic": {"kl_pull": 1e-3},
    "healthy": {"kl_pull": 0.3, "kl_cycle_steps": 5, "max_steps": 60, "learning_rate": 0.1},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_made_to_land_in_each(tmp_path, name, caplog):
    model = blob_bert(init_eps=1e-4 if name == "deterministic" else 0.05)
    run = make_trainer(tmp_path, model, **{"max_steps": 20, "learning_rate": 1e-3, **RUNS[name]})
    with caplog.at_level("INFO", logger="blob_hf"):
        run.train()
    assert run.kl_verdict.name == name, run.kl_verdict
    assert f"KL verdict: {name}" in caplog.text
    verdict = run.kl_verdict
    assert verdict.figures.sample_gap is not None
    run.evaluate()
    run.args.eval_samples = 2
    run.evaluate()
    assert run.kl_verdict is verdict  # what a training came to does not change with what is measured afterwards
    run.create_model_card()
    assert f"KL verdict: {name}" in (tmp_path / "README.md").read_text()


def test_a_spike_at_the_end_of_the_run_falls_where_the_learning_rate_is_zero(tmp_path, caplog):
    run = make_trainer(tmp_path, blob_bert(), max_steps=60, kl_cycle_steps=60)
    run.train()
    assert run.kl.diagnosis.total_weight == pytest.approx(1.0) and run.kl.diagnosis.exposure < 0.04
    assert run.kl.verdict.figures.exposure == pytest.approx(run.kl.diagnosis.exposure, rel=1e-4)  # as predicted
    assert run.kl.verdict.figures.total_weight == pytest.approx(1.0)


def test_a_posterior_with_stds_of_0_has_no_kl_to_train(tmp_path):
    model = blob_bert()
    layer = next(iter(gaussian_layers(model).values()))
    std = layer.std.detach().clone()
    std[2] = 0
    layer.set_std(std)
    with pytest.raises(BlobError, match=f"^{std.shape[1]} stds of the posterior are 0, .*its KL is infinite"):
        make_trainer(tmp_path, model).train()


def test_plain_lora_has_no_verdict(tmp_path):
    from helpers.models import TARGETS, tiny_bert
    from peft import LoraConfig

    from blob_hf.tuner.build import get_lora_model

    lora = get_lora_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"]))
    run = make_trainer(tmp_path, lora, point_estimate=True)
    run.train()
    assert run.kl_verdict is None


def test_a_learning_rate_that_is_far_too_high_has_diverged(tmp_path):
    run = make_trainer(tmp_path, max_steps=10, learning_rate=1e6, warmup_steps=0, lr_scheduler_type="constant")
    run.train()
    figures, nlls = run.kl_verdict.figures, [row["nll"] for row in run.kl.history.rows]
    assert run.kl_verdict.name == "diverged" and "lower learning_rate" in str(run.kl_verdict)
    assert figures.nll_start == pytest.approx(nlls[0]) and figures.nll_end == pytest.approx(nlls[-1])
    assert figures.nll_end > figures.nll_start + 1
