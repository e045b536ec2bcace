"""The scale of a posterior: what it does to samples, the search against a grid, files, and what has none."""

import json
import math

import pytest
import torch
from helpers.models import TARGETS, random_ids, randomize_b, tiny_bert
from helpers.running import GLUE, SUMMARIZATION, run_script
from helpers.training import blob_bert, fit, rows, trainer
from peft import LoraConfig

from blob_hf import BlobError, BlobModel, Sampling
from blob_hf.baselines import PosteriorScale, attach_mc_dropout, fit_posterior_scale, scale_posterior
from blob_hf.baselines.laplace import library_is_there
from blob_hf.baselines.posterior_scale import FINE, LARGEST, smallest
from blob_hf.inference.predict import predict_classes
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.posterior import gaussian_layers, sampled_layers


def bert_inputs(count=5):
    ids = random_ids(count, 8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def dropout_bert():
    torch.manual_seed(0)
    model = get_lora_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"], r=4, lora_dropout=0.2))
    randomize_b(model)
    return attach_mc_dropout(model)


def posterior_bert():
    model = blob_bert()
    randomize_b(model)
    for layer in gaussian_layers(model).values():
        layer.set_std(torch.full_like(layer.weight, 0.1))
    return model


@pytest.mark.parametrize("make", [posterior_bert, dropout_bert])
def test_samples_lie_so_many_times_as_far_from_the_mean(make):
    sampling = Sampling(3, seed=4)
    before = [layer.samples(sampling) - layer.weight for layer in sampled_layers(make())]
    model = make()
    scale_posterior(model, 2.0)
    scale_posterior(model, 1.5)
    for distance, layer in zip(before, sampled_layers(model), strict=True):
        torch.testing.assert_close(layer.samples(sampling) - layer.weight, 3.0 * distance, atol=1e-6, rtol=1e-4)


def test_the_covariance_of_a_linearised_laplace_grows_with_its_square(tmp_path):
    if not library_is_there():
        pytest.skip("laplace-torch is not installed")
    from blob_hf.baselines.linearized import Linearized

    def make():
        torch.manual_seed(0)
        model = get_lora_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"], r=4))
        randomize_b(model)
        return model

    fitted, _ = fit(tmp_path, "laplace", make, rows(24), laplace_prior="marglik")
    model, inputs = fitted.blob_model.eval(), bert_inputs()
    before = Linearized.of(model, inputs).covariance()
    scale_posterior(model, 3.0)
    torch.testing.assert_close(Linearized.of(model, inputs).covariance(), 9 * before, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("optimum", [0.3, 0.9, 1.0, 2.7, 9.0])
def test_the_search_finds_the_least_of_a_smooth_loss(optimum):
    """Within one fine step (a factor 2^(1/4)) of the known minimum, in a dozen evaluations."""
    calls = []

    def loss(scale):
        calls.append(scale)
        return math.log(scale / optimum) ** 2

    assert abs(math.log(smallest(loss) / optimum)) <= math.log(FINE)
    assert len(calls) == len(set(calls)) <= 14


def test_the_search_stays_within_its_bounds():
    assert smallest(lambda scale: scale) == 1 / LARGEST and smallest(lambda scale: -scale) == LARGEST


def test_the_fit_is_the_best_of_a_grid_of_the_predictives_nll_and_the_prior():
    """By brute force: a fresh model scaled by each value of a fine grid, scored on the same rows and samples."""
    inputs, labels, sampling = bert_inputs(16), torch.arange(16) % 3, Sampling(8)

    def nll(model):
        log_probs = predict_classes(model.eval(), inputs, sampling).log_probs
        return -log_probs[range(16), labels].mean().item()

    model = posterior_bert()
    found = fit_posterior_scale(model, lambda: (16 * nll(model), 16))
    losses = {}
    for step in range(-16, 17):
        scale, fresh = 2 ** (step / 4), posterior_bert()
        scale_posterior(fresh, scale)
        losses[scale] = 16 * nll(fresh) + 0.5 * math.log2(scale) ** 2
    best = min(losses, key=losses.get)
    assert found.scale == pytest.approx(best, rel=1e-3)
    assert found.nll_after == pytest.approx(nll(model), rel=1e-4)  # it is left as what was found
    assert model.companion("posterior_scale") is found


def test_few_rows_do_not_decide_alone():
    """A dozen rows that each gain 0.03 nats by s = 1/16: 0.36 nats, and the prior costs 8."""
    model, losses = posterior_bert(), iter([0.036] + [0.005] * 50)
    assert 0.5 < fit_posterior_scale(model, lambda: (12 * next(losses), 12)).scale < 2


@pytest.mark.parametrize("make", [posterior_bert, dropout_bert])
def test_a_saved_adapter_has_it(tmp_path, make):
    model = make()
    scale_posterior(model, 5.0)
    scale_posterior(model, 0.5)
    model.save_pretrained(tmp_path)
    loaded = BlobModel.from_pretrained(tmp_path, model=tiny_bert())
    for a, b in zip(sampled_layers(model), sampled_layers(loaded), strict=True):
        torch.testing.assert_close(a.samples(Sampling(2)), b.samples(Sampling(2)), atol=1e-6, rtol=1e-5)
    assert loaded.companion("posterior_scale") == PosteriorScale(2.5)
    assert json.loads((tmp_path / "posterior_scale.json").read_text())["scale"] == 2.5
    (tmp_path / "posterior_scale.json").write_text("{}")
    with pytest.raises(BlobError, match="posterior_scale.json is damaged"):
        BlobModel.from_pretrained(tmp_path, model=tiny_bert())


def test_what_has_no_noise_is_refused(tmp_path):
    with pytest.raises(BlobError, match="no posterior to sample from"):
        scale_posterior(get_lora_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"])), 2.0)
    with pytest.raises(BlobError, match="scale of a posterior must be > 0, got 0"):
        scale_posterior(posterior_bert(), 0)

    def make():
        torch.manual_seed(0)
        return get_lora_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"], r=4))

    ensemble, _ = fit(tmp_path, "ensemble", make, rows(16), ensemble_size=2, max_steps=1)
    with pytest.raises(BlobError, match="members are networks of their own"):
        scale_posterior(ensemble.model, 2.0)


QUICK = [
    "--demo", "--max_steps", "8", "--eval_samples", "3", "--max_eval_samples", "30", "--disable_tqdm", "true",
    "--use_cpu", "true", "--compare_lora", "false",
]  # fmt: skip


@pytest.mark.slow
def test_the_script_fits_saves_and_shows_it(monkeypatch, tmp_path, capsys):
    flags = [*QUICK, "--posterior_scale", "fit", "--output_dir", tmp_path]
    assert run_script(monkeypatch, GLUE, *flags) == 0
    saved = json.loads((tmp_path / "posterior_scale.json").read_text())
    assert saved["held_out"] == 12  # a tenth of the demo's rows
    report = (tmp_path / "report.md").read_text()
    assert "posterior not scaled" in report and f"| posterior scale | {saved['scale']:.3g}" in report
    before, after = (json.loads((tmp_path / f"{name}_results.json").read_text()) for name in ("unscaled", "eval"))
    assert before["unscaled_mean_nll"] == pytest.approx(after["eval_mean_nll"], rel=1e-5)
    # evaluated again from the saved adapter
    again = [*QUICK, "--do_eval", "--posterior_scale", "fit", "--output_dir", tmp_path]
    assert run_script(monkeypatch, GLUE, *again) == 0
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_nll"] == pytest.approx(
        after["eval_nll"], rel=1e-4
    )


@pytest.mark.slow
def test_a_summarizer_is_fitted_to_and_stopped_by_held_out_dialogues(monkeypatch, tmp_path):
    flags = [
        "--demo", "--max_steps", "6", "--max_train_samples", "40", "--max_eval_samples", "2", "--max_predict_samples",
        "2", "--max_new_tokens", "4", "--eval_samples", "2", "--compare_base", "false", "--use_cpu", "true",
        "--disable_tqdm", "true", "--posterior_scale", "fit", "--early_stopping_patience", "2",
        "--output_dir", tmp_path,
    ]  # fmt: skip
    assert run_script(monkeypatch, SUMMARIZATION, *flags) == 0
    saved = json.loads((tmp_path / "posterior_scale.json").read_text())
    held_out = 4  # a tenth of 40 dialogues, whose summaries have more than 10 tokens each
    assert saved["held_out"] > 10 * held_out
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    evaluated = [entry["eval_nll"] for entry in state["log_history"] if "eval_nll" in entry]
    assert len(evaluated) > 1 and state["best_metric"] == min(evaluated)
    # before the fit it is the predictive of the checkpoint that was kept, on the same dialogues
    assert saved["nll_before"] == pytest.approx(min(evaluated), rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--posterior_scale", "best"], "posterior_scale must be a number or fit, got 'best'"),
        (["--posterior_scale", "0"], "posterior_scale must be > 0, got 0"),
        (["--posterior_scale", "fit", "--method", "lora"], "which method lora has not"),
        (["--posterior_scale", "2", "--method", "ensemble"], "which method ensemble has not"),
        (["--posterior_scale", "fit", "--eval_samples", "0"], "eval_samples must be >= 1, got 0"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, tmp_path, capsys, flags, message):
    assert run_script(monkeypatch, GLUE, *QUICK, *flags, "--output_dir", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_the_predictives_nll_of_a_trainer_is_that_of_its_evaluation(tmp_path):
    run = trainer(tmp_path, posterior_bert())
    data = rows(13, seed=1)
    total, count = run.predictive_nll(data)
    assert count == 13 and total / count == pytest.approx(run.evaluate(data)["eval_nll"], rel=1e-5)
