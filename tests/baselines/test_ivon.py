"""IVON against the papers' equations in plain numbers, and against the exact posterior of a quadratic."""

import pytest
import torch
from helpers.models import TARGETS, random_ids, randomize_b, tiny_bert
from helpers.training import fit
from peft import LoraConfig
from torch import nn

from blob_hf import BlobError
from blob_hf.baselines import IVONConfig, IVONState, attach_ivon
from blob_hf.baselines.ivon import IVON, NewtonLinear, newton_layers
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.draws import sample_generator, standard_normal
from blob_hf.tuner.posterior import lora_layers
from blob_hf.tuner.sampling import Sampling


def lora(head=None):
    torch.manual_seed(0)
    targets = ["query", "value"] if head else TARGETS["bert"]
    config = LoraConfig(target_modules=targets, r=4, lora_alpha=8, modules_to_save=head)
    model = get_lora_model(tiny_bert(), config).eval()
    randomize_b(model)
    return model


def quadratic(shape, config, lr):
    """A layer whose loss is sum a/2 (w - b)^2, and its optimizer."""
    torch.manual_seed(1)
    layer = NewtonLinear(nn.Linear(*shape, bias=False), "layer", "lora_A", config)
    return layer, IVON([{"params": [layer.weight]}], [layer], seed=7, lr=lr)


def run(layer, optimizer, a, b, steps):
    for _ in range(steps):
        optimizer.perturb()
        (0.5 * a * (layer.weight - b).square()).sum().backward()
        optimizer.step()


def test_a_step_is_the_papers_equations_in_plain_numbers():
    config = IVONConfig(ess=50.0, hess_init=0.3, prior_std=0.8, beta1=0.8, beta2=0.9, clip_radius=0.05)
    layer, optimizer = quadratic((1, 1), config, lr=0.01)
    m, h, g = layer.weight.item(), 0.3, 0.0
    delta = 1 / (50 * 0.8**2)
    for t in range(1, 21):
        eps = torch.randn(1, 1, generator=sample_generator("layer", 7, t - 1)).item()
        sigma = (50 * (h + delta)) ** -0.5
        theta = m + sigma * eps
        gradient = 1.7 * (theta - 0.4)
        estimate = gradient * (theta - m) / sigma**2
        g = 0.8 * g + 0.2 * gradient
        h = 0.9 * h + 0.1 * estimate + 0.5 * 0.1**2 * (h - estimate) ** 2 / (h + delta)
        step = (g / (1 - 0.8**t) + delta * m) / (h + delta)
        m -= 0.01 / 0.05 * max(-0.05, min(0.05, step))
        run(layer, optimizer, 1.7, 0.4, 1)
        assert layer.weight.item() == pytest.approx(m, rel=1e-4) and layer.hessian.item() == pytest.approx(h, rel=1e-4)
        assert layer.std.item() == pytest.approx((50 * (h + delta)) ** -0.5, rel=1e-4)


def test_of_a_quadratic_it_finds_the_exact_posterior():
    config = IVONConfig(ess=100.0, hess_init=4.0, prior_std=0.5, beta2=0.98, clip_radius=1e3)
    layer, optimizer = quadratic((400, 2), config, lr=100.0)
    curvature, target = torch.tensor([[2.0], [0.7]]), torch.tensor([[1.0], [-0.5]])
    run(layer, optimizer, curvature, target, 250)
    # likelihood exp(-100 a/2 (w - b)^2) times the prior N(0, 0.25): 400 weights of each kind to take the mean of
    precision = 100 * curvature + 1 / 0.25
    torch.testing.assert_close(layer.std.square().mean(1, keepdim=True), 1 / precision, rtol=0.06, atol=0)
    mean = 100 * curvature * target / precision
    torch.testing.assert_close(layer.weight.detach().mean(1, keepdim=True), mean, rtol=0.03, atol=0)


def test_a_sample_is_a_plain_network_with_drawn_weights():
    model = attach_ivon(lora(), IVONConfig(ess=200.0, hess_init=0.5))
    ids = random_ids(3, 9)
    with model.posterior_samples(2, seed=5):
        together = model(input_ids=ids.repeat(2, 1)).logits.view(2, 3, -1)
    std = (200 * (0.5 + 1 / 200)) ** -0.5
    for s in range(2):
        torch.manual_seed(0)
        plain = tiny_bert()
        for path, module in lora_layers(model, "default"):
            drawn = []
            for part in (module.lora_A["default"], module.lora_B["default"]):
                eps = standard_normal(part.name, Sampling(1, seed=5, first=s), part.weight.shape)[0]
                drawn.append(part.weight.data + std * eps)
            weight = plain.get_submodule(path.removeprefix("base_model.model.")).weight
            weight.data += 8 / 4 * drawn[1] @ drawn[0]
        torch.testing.assert_close(plain(input_ids=ids).logits, together[s], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_micro_batches_of_a_step_see_one_draw(tmp_path):
    def trained(**sizes):
        trainer, _ = fit(tmp_path, "ivon", lambda: attach_ivon(lora()), beta=0.5, lr_scheduler_type="constant", **sizes)
        assert trainer.args.max_grad_norm == 0 and trainer.model.companion("method") == IVONState(prior_std=0.5)
        return newton_layers(trainer.model)

    whole = trained(per_device_train_batch_size=8)
    parts = trained(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.weight, other.weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.hessian, other.hessian, atol=1e-6, rtol=1e-4)
        assert not torch.equal(one.hessian, torch.full_like(one.hessian, 1e-3))


def test_the_head_is_adamws_and_the_longest_step_of_a_weight_is_the_learning_rate(tmp_path):
    model = attach_ivon(lora(head=["classifier"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer, _ = fit(tmp_path, "ivon", lambda: model, max_steps=1, lr_scheduler_type="constant", learning_rate=0.01)
    after = dict(trainer.model.named_parameters())
    for name, old in before.items():
        moved = (after[name] - old).abs()
        if "classifier" in name:  # the first step of Adam
            torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-2, atol=0)
        else:
            assert moved.max() <= 0.01 * 1.001 and moved.max() > 0.009


def test_an_overflowed_step_goes_on_from_the_means():
    layer, optimizer = quadratic((3, 2), IVONConfig(), lr=0.1)
    mean = layer.weight.detach().clone()
    optimizer.perturb()
    assert not torch.equal(layer.weight, mean)
    optimizer.perturb()  # as after a step that a gradient scaler has left out
    optimizer.restore()
    assert torch.equal(layer.weight, mean)
    with pytest.raises(BlobError, match="call perturb"):
        optimizer.step()


def test_settings_out_of_range_and_a_second_posterior_are_refused():
    for changes, message in (({"ess": 0}, "ess must be > 0"), ({"beta2": 1.0}, "beta2 must be >= 0 and < 1")):
        with pytest.raises(BlobError, match=message):
            IVONConfig(**changes)
    with pytest.raises(BlobError, match="has a posterior already"):
        attach_ivon(attach_ivon(lora()))
