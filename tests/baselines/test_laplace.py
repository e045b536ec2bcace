"""Laplace-LoRA: against exact posteriors, finite differences, and laplace-torch's own matrices."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.models import TARGETS, random_ids, randomize_b, tiny_bert
from helpers.running import GLUE, SUMMARIZATION, run_script
from helpers.training import arguments, fit, rows
from helpers.training import trainer as make_trainer
from peft import LoraConfig
from torch import nn
from torch.utils.data import DataLoader

from blob_hf import BlobError, BlobModel, BlobTrainer
from blob_hf.baselines.laplace import (
    PRECISION_GRID,
    attach_factors,
    fit_kron,
    fit_laplace,
    library_is_there,
    lora_weights,
)
from blob_hf.baselines.linearized import Factors, LaplaceLinear, Linearized, linearized_prediction
from blob_hf.inference.predict import sampled_prediction
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.posterior import sampled_layers
from blob_hf.tuner.sampling import Sampling

needs_library = pytest.mark.skipif(not library_is_there(), reason="laplace-torch is not installed")


def base(seed=0):
    torch.manual_seed(seed)
    return tiny_bert()


def lora_bert(seed=0):
    model = get_lora_model(base(seed), LoraConfig(target_modules=TARGETS["bert"], r=4)).eval()
    randomize_b(model, 0.3)
    return model


def random_factors(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in lora_weights(model, "all").items():
        out, inside = weight.shape
        vectors = [torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (out, inside)]
        values = [torch.rand(n, generator=generator) * 5 for n in (out, inside)]
        found[name] = Factors(*values, *vectors)
    return found


class LinearWithLora(nn.Module):
    """y = B A x with B fixed: linear in A, so that its posterior under Gaussian noise is exactly Gaussian."""

    def __init__(self, b, inside):
        super().__init__()
        self.a = nn.Linear(inside, b.shape[1], bias=False)
        self.b = nn.Linear(b.shape[1], b.shape[0], bias=False)
        self.b.weight.data.copy_(b)

    def forward(self, batch):
        return self.b(self.a(batch["input_ids"]))


@needs_library
def test_a_linear_gaussian_model_has_its_exact_posterior():
    torch.manual_seed(0)
    x, y, b = torch.randn(40, 6), torch.randn(40, 5), torch.randn(5, 3)
    network = LinearWithLora(b, 6)
    data = [{"input_ids": x[i], "labels": y[i]} for i in range(40)]
    weight = network.a.weight
    factors, precision = fit_kron(
        network, {"a": weight}, DataLoader(data, 8), marginal_likelihood=False, likelihood="regression"
    )
    assert precision == 1.0
    layer = LaplaceLinear(network.a, "a", "lora_A", factors["a"], precision)
    # unit noise and prior: the precision of vec(A), rows one after another, is B^T B (x) X^T X + 1
    exact = torch.linalg.inv(torch.kron(b.T @ b, x.T @ x) + torch.eye(18))
    unit = torch.eye(18).view(18, 1, 3, 6)  # the gradient of one entry of A each
    columns = layer.covariance(unit.transpose(0, 1)).squeeze(0)
    torch.testing.assert_close(columns, exact, atol=1e-4, rtol=1e-3)
    drawn = layer.draw(Sampling(20_000, seed=0)).flatten(1) - weight.detach().flatten()
    # an entry of a covariance of 20,000 draws has a std of at most sqrt(2 / 20,000) = 1 % of the variances
    assert (drawn.T @ drawn / 20_000 - exact).abs().max() < 0.05 * exact.diagonal().max()


@needs_library
def test_the_factors_are_laplace_torchs_posterior():
    from laplace import Laplace

    model, data = lora_bert(), rows(20)
    loader = DataLoader(data.with_format("torch"), 5)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model(input_ids=batch["input_ids"]).logits

    network, weights = Logits(), lora_weights(model, "all")
    factors, precision = fit_kron(network, weights, loader)
    own = Laplace(network, "classification", subset_of_weights="all", hessian_structure="kron", prior_precision=1.0)
    own.fit(loader)
    own.optimize_prior_precision(method="marglik")
    assert precision == pytest.approx(float(own.prior_precision))
    covariance = torch.linalg.inv(own.posterior_precision.to_matrix())
    start = 0
    names = {id(weight): name for name, weight in weights.items()}
    for parameter in [p for p in network.parameters() if p.requires_grad]:
        size = parameter.numel()
        one = factors[names[id(parameter)]]
        basis = torch.kron(one.u_out, one.u_in)
        found = basis @ torch.diag(one.scale(precision).flatten() ** 2) @ basis.T
        torch.testing.assert_close(found, covariance[start : start + size, start : start + size], atol=1e-4, rtol=1e-3)
        start += size
    assert start == len(covariance) and all(weight.requires_grad for weight in weights.values())


def test_the_covariance_of_the_logits_is_that_of_finite_differences():
    model = lora_bert().double()
    factors = random_factors(model)
    attach_factors(model, factors, 2.0)
    ids = random_ids(3, 9)
    found = Linearized.of(model, {"input_ids": ids}).covariance()
    expected = torch.zeros(3, 3, 3, dtype=torch.float64)
    layers = {layer.weight_name: layer for layer in sampled_layers(model)}
    for name, one in factors.items():
        weight = layers[name].weight
        jacobian = torch.zeros(3, 3, *weight.shape, dtype=torch.float64)
        with torch.no_grad():
            for i in range(weight.shape[0]):
                for j in range(weight.shape[1]):
                    outputs = []
                    for step in (1e-5, -1e-5):
                        weight[i, j] += step
                        outputs.append(model(input_ids=ids).logits)
                        weight[i, j] -= step
                    jacobian[:, :, i, j] = (outputs[0] - outputs[1]) / 2e-5
        basis = torch.kron(one.u_out, one.u_in).double()
        sigma = basis @ torch.diag(one.scale(2.0).flatten().double() ** 2) @ basis.T
        flat = jacobian.flatten(2)
        expected += flat @ sigma @ flat.transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-3)
    assert not any(layer.is_frozen_somewhere for layer in layers.values())


def test_narrow_posteriors_predict_alike_linearised_and_sampled():
    model = lora_bert()
    attach_factors(model, random_factors(model), 4000.0)  # stds of about 1.6 %: the network is linear over them
    inputs = {"input_ids": random_ids(4, 9)}
    linear = linearized_prediction(model, inputs, Sampling(4000, seed=3))
    sampled = sampled_prediction(model, inputs, Sampling(4000, seed=3, batch_size=100))
    torch.testing.assert_close(linear.mean_log_probs, sampled.mean_log_probs)
    for moment in (torch.mean, torch.std):  # 4,000 draws: 1.1 % of the std each, 5 sigma of the difference
        first, second = (moment(one.sample_log_probs, dim=1) for one in (linear, sampled))
        spread = linear.sample_log_probs.std(dim=1)
        assert ((first - second).abs() < 0.08 * spread + 1e-4).all()
    again = linearized_prediction(model, {"input_ids": inputs["input_ids"][2:3]}, Sampling(4000, seed=3))
    torch.testing.assert_close(again.sample_log_probs[0], linear.sample_log_probs[2])  # whatever batch it is in


def test_draws_do_not_depend_on_the_signs_of_eigenvectors(monkeypatch):
    model = lora_bert()
    attach_factors(model, random_factors(model), 10.0)
    inputs = {"input_ids": random_ids(3, 9)}
    found = linearized_prediction(model, inputs, Sampling(5, seed=3)).sample_log_probs
    eigh = torch.linalg.eigh

    def turned(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * torch.tensor([1.0, -1.0, 1.0])

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    again = linearized_prediction(model, inputs, Sampling(5, seed=3)).sample_log_probs
    torch.testing.assert_close(again, found)


def test_samples_of_the_last_layers_have_the_covariance_of_those_alone():
    whole, part, below = lora_bert(), lora_bert(), lora_bert()
    inputs = {"input_ids": random_ids(4, 8)}
    factors = {name: one for name, one in random_factors(whole).items() if "classifier" not in name}  # it outweighs all
    attach_factors(whole, factors, 2.0)
    attach_factors(part, {name: one for name, one in factors.items() if ".layer.1." in name}, 2.0)
    attach_factors(below, {name: one for name, one in factors.items() if ".layer.0." in name}, 2.0)
    assert 0 < len(sampled_layers(part)) < len(sampled_layers(whole))
    of_last, alone, of_all = (
        linearized_prediction(model, inputs, Sampling(6, layers=layers)).sample_log_probs
        for model, layers in ((whole, 1), (part, None), (whole, None))
    )
    torch.testing.assert_close(of_last, alone, atol=1e-6, rtol=1e-5)
    assert (of_last - of_all).abs().max() > 100 * (of_last - alone).abs().max()
    with pytest.raises(BlobError, match="no weight with a Laplace posterior is in the last 1 layers"):
        linearized_prediction(below, inputs, Sampling(6, layers=1))


def test_the_last_layer_is_the_head_or_the_last_layer_with_lora():
    assert {name.split(".")[2] for name in lora_weights(lora_bert(), "last_layer")} == {"classifier"}
    trained_head = get_lora_model(tiny_bert(), LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))
    assert all(".layer.1." in name and ".value." in name for name in lora_weights(trained_head, "last_layer"))
    assert len(lora_weights(lora_bert(), "all")) == 10


def fitted(folder, **changes):
    changes = {"per_device_eval_batch_size": 6, "eval_samples": 5, **changes}
    return fit(folder, "laplace", lora_bert, rows(30), rows(20, seed=2), **changes)[0]


@needs_library
@pytest.mark.parametrize("predictive", ["linearized", "sampled"])
def test_a_saved_posterior_predicts_the_same(tmp_path, predictive):
    trainer = fitted(tmp_path, laplace_predictive=predictive)
    metrics = trainer.evaluate()
    trainer.save_model()
    loaded = BlobModel.from_pretrained(tmp_path, model=base()).eval()
    assert loaded.method == "laplace" and loaded.companion("method") == replace(
        trainer.model.companion("method"), predictive="linearized"
    )
    loaded.set_companion(replace(loaded.companion("method"), predictive=predictive))
    args = arguments(tmp_path / "again", eval_samples=5)
    again = BlobTrainer(model=loaded, args=args, eval_dataset=rows(13, seed=1), point_estimate=True).evaluate()
    for name in ("eval_nll", "eval_mean_nll", "eval_sample_nll"):
        assert again[name] == pytest.approx(metrics[name], rel=1e-5)
    assert metrics["eval_nll"] != metrics["eval_mean_nll"]
    before = make_trainer(tmp_path, lora_bert(), point_estimate=True)
    assert metrics["eval_mean_nll"] == pytest.approx(before.evaluate()["eval_nll"], rel=1e-6)
    other = lora_bert(seed=1)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", tmp_path / "adapter_model.safetensors")
    with pytest.raises(BlobError, match="is not the one that laplace.safetensors was fitted to"):
        BlobModel.from_pretrained(tmp_path, model=base())
    assert "Laplace-LoRA adapter" in (tmp_path / "README.md").read_text()


@needs_library
def test_validation_takes_the_precision_of_the_smallest_nll(tmp_path):
    trainer = fitted(tmp_path, laplace_prior="validation")
    layers = [layer for layer in sampled_layers(trainer.model) if isinstance(layer, LaplaceLinear)]
    chosen = trainer.model.companion("method").prior_precision
    assert {layer.prior_precision for layer in layers} == {chosen}
    nlls = {}
    for precision in PRECISION_GRID:
        for layer in layers:
            layer.prior_precision = float(precision)
        output = trainer.predict(rows(20, seed=2))
        nlls[float(precision)] = output.metrics["test_nll"]
    assert nlls[chosen] == min(nlls.values()) and math.isfinite(nlls[chosen])


@needs_library
def test_a_posterior_over_the_last_layer_leaves_the_others_alone(tmp_path):
    trainer = fitted(tmp_path, laplace_subset="last_layer")
    assert {layer.name for layer in sampled_layers(trainer.model)} == {"classifier", "classifier.lora_B"}
    with pytest.raises(BlobError, match="needs a plain LoRA adapter, but this one has a posterior"):
        fit_laplace(trainer.model, trainer.plain_loader(rows()))


def test_what_the_fit_needs_is_asked_for_before_it(tmp_path):
    if library_is_there():
        with pytest.raises(BlobError, match="needs the training data, but there is none"):
            fit(tmp_path, "laplace", lora_bert, rows(3).select([]))
        with pytest.raises(BlobError, match="needs held-out rows, but there are none"):
            fit(tmp_path, "laplace", lora_bert, laplace_prior="validation")
    with pytest.raises(BlobError, match="eval_samples must be >= 1"):
        fit(tmp_path, "laplace", lora_bert, laplace_prior="validation", eval_samples=0)


def test_mistakes_are_one_line(monkeypatch, tmp_path, capfd):
    quick = ["--demo", "--method", "laplace", "--use_cpu", "true", "--output_dir", tmp_path / "run"]
    assert run_script(monkeypatch, SUMMARIZATION, *quick) == 2
    assert "method laplace predicts classes" in capfd.readouterr().err
    assert run_script(monkeypatch, GLUE, *quick) == 2
    assert "train one with --method lora, then name it with --adapter_name_or_path" in capfd.readouterr().err
    monkeypatch.setattr("blob_hf.baselines.laplace.library_is_there", lambda: False)
    with pytest.raises(BlobError, match="pip install laplace-torch"):
        fit(tmp_path, "laplace", lora_bert, do_train=True)
