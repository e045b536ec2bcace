"""ScalaBL against its definition, written out on plain matrices."""

import math

import pytest
import torch
from helpers.models import TARGETS, random_ids, randomize_b, tiny_bert
from helpers.training import fit
from peft import LoraConfig

from blob_hf import BlobError
from blob_hf.baselines import ScalaBLState, attach_scalabl
from blob_hf.baselines.scalabl import INIT_STD, subspace_layers
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.draws import standard_normal
from blob_hf.tuner.posterior import lora_layers
from blob_hf.tuner.sampling import Sampling


def lora(rank=4):
    torch.manual_seed(0)
    model = get_lora_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"], r=rank, lora_alpha=8)).eval()
    randomize_b(model)
    return model


def test_a_sample_is_b_diag_s_v_on_plain_weights():
    model = attach_scalabl(lora())
    for layer in subspace_layers(model).values():
        layer.log_std.data.add_(2.0)
    ids = random_ids(3, 9)
    with model.posterior_samples(2, seed=5):
        together = model(input_ids=ids.repeat(2, 1)).logits.view(2, 3, -1)
    for s in range(2):
        torch.manual_seed(0)
        plain = tiny_bert()  # the same base weights
        for path, module in lora_layers(model, "default"):
            a, b = module.lora_A["default"], module.lora_B["default"].weight
            v = a.weight / a.weight.norm(dim=1, keepdim=True)
            eps = standard_normal(a.name, Sampling(1, seed=5, first=s), (4, 1))[0, :, 0]
            scale = a.weight.norm(dim=1) + a.log_std.exp()[:, 0] * eps
            weight = plain.get_submodule(path.removeprefix("base_model.model.")).weight
            weight.data += 8 / 4 * b.data @ torch.diag(scale.data) @ v.data
        torch.testing.assert_close(plain(input_ids=ids).logits, together[s], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_the_rotation_keeps_the_network_and_starts_as_published():
    before, after = lora(), attach_scalabl(lora())
    ids = random_ids(3, 9)
    torch.testing.assert_close(after(input_ids=ids).logits, before(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    for (_, old), layer in zip(lora_layers(before, "default"), subspace_layers(after).values(), strict=True):
        gram = layer.weight @ layer.weight.T
        torch.testing.assert_close(gram, torch.diag(torch.linalg.svdvals(old.lora_A["default"].weight) ** 2))
        std = layer.log_std.exp()
        assert (std >= INIT_STD / math.sqrt(2) - 1e-6).all() and (std <= INIT_STD + 1e-6).all()


def test_the_kl_is_that_of_normals_and_its_step_goes_down_its_gradient():
    layer = next(iter(subspace_layers(attach_scalabl(lora())).values()))
    mean, std = layer.weight.norm(dim=1), layer.log_std.exp()[:, 0]
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(torch.zeros(4), torch.full((4,), 0.7)))
    torch.testing.assert_close(layer.kl(0.7), expected.sum())
    gradients = torch.autograd.grad(expected.sum(), [layer.weight, layer.log_std])
    stepped = [p.detach() - 0.01 * g for p, g in zip((layer.weight, layer.log_std), gradients, strict=True)]
    layer.descend_kl(0.01, 0.7)
    torch.testing.assert_close([layer.weight.detach(), layer.log_std.detach()], stepped)
    layer.descend_kl(1e6, 0.7)  # neither jumps over the prior
    assert not layer.weight.any() and torch.allclose(layer.log_std, torch.tensor(0.7).log())


def test_training_applies_the_kl_as_blob_weighs_it_and_beta_is_its_prior(tmp_path):
    model = attach_scalabl(lora())
    before = {name: layer.log_std.detach().clone() for name, layer in subspace_layers(model).items()}
    settings = {"learning_rate": 1e-9, "kl_cycle_steps": 3, "kl_learning_rate": 0.5, "weight_decay": 0.1}
    trainer, _ = fit(tmp_path, "scalabl", lambda: model, max_steps=5, beta=0.4, **settings)
    assert trainer.model.companion("method") == ScalaBLState(0.4, 0.5)
    after = subspace_layers(trainer.model)
    weights = [1, 2, 4, 1, 2]  # 2^i / (2^(M+1) - 1), i = 1 .. M, twice 1/15 at M = 3
    scales = [1 - t / 5 for t in range(5)]  # the linear schedule before each step
    for name, start in before.items():
        log_std = start
        for weight, scale in zip(weights, scales, strict=True):
            log_std = log_std - 0.5 * 2 * weight / 15 * scale * (torch.exp(2 * log_std) / 0.16 - 1)
        torch.testing.assert_close(after[name].log_std.detach(), log_std, atol=1e-6, rtol=1e-6)


def test_a_kl_that_will_not_be_applied_is_said_before_the_training(tmp_path, caplog):
    fit(tmp_path / "short", "scalabl", lambda: attach_scalabl(lora()), kl_cycle_steps=500)
    assert "kl_cycle_steps gives a KL cycle of M = 500 steps, but the run has only 4" in caplog.text
    caplog.clear()
    fit(tmp_path / "gamma", "scalabl", lambda: attach_scalabl(lora()), kl_cycle_steps=None)  # 100 * 24**(pi / 8) / 8
    assert "the KL will not be applied: gamma = 8 gives a KL cycle of M = 43 steps" in caplog.text
    caplog.clear()
    fit(tmp_path / "heard", "scalabl", lambda: attach_scalabl(lora()), kl_cycle_steps=2)
    assert "KL" not in caplog.text


def test_noise_of_a_training_step_is_one_network():
    model = attach_scalabl(lora()).train()
    layer = next(iter(subspace_layers(model).values()))
    x = torch.randn(5, 16)
    torch.manual_seed(3)
    eps = torch.randn(4, 1)[:, 0]
    torch.manual_seed(3)
    mean = x @ layer.weight.T
    expected = mean * (1 + layer.log_std.exp()[:, 0] * eps / layer.weight.norm(dim=1))
    torch.testing.assert_close(layer(x), expected)


def test_what_has_no_full_rank_or_a_posterior_is_refused():
    model = lora()
    next(module for _, module in lora_layers(model, "default")).lora_A["default"].weight.data[1] = 0
    with pytest.raises(BlobError, match="needs an A of full rank"):
        attach_scalabl(model)
    with pytest.raises(BlobError, match="has a posterior already"):
        attach_scalabl(attach_scalabl(lora()))
    with pytest.raises(BlobError, match="prior_std must be > 0"):
        attach_scalabl(lora(), prior_std=0)
