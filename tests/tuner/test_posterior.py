import pytest
import torch
from helpers.models import TARGETS, TINY, random_ids, randomize_b
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributions import Normal, kl_divergence

from blob_hf import BlobConfig, get_blob_model
from blob_hf.tuner.posterior import attach_posterior, gaussian_layers, mean_posterior_std, posterior_samples
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError


@pytest.fixture(params=["bert", "roberta"])
def model(request):
    blob = get_blob_model(TINY[request.param](), BlobConfig(target_modules=TARGETS[request.param], init_eps=0.9, r=4))
    randomize_b(blob)
    return blob.eval()


def test_posterior_samples_are_sample_major_and_each_is_one_network(model):
    ids = random_ids(4, 9)
    with model.posterior_samples(3, seed=5):
        together = model(input_ids=ids.repeat(3, 1)).logits
    for s in range(3):
        with model.posterior_samples(Sampling(1, seed=5, first=s)):
            alone = model(input_ids=ids).logits
        torch.testing.assert_close(together[4 * s : 4 * s + 4], alone)
    assert (together[:4] - together[4:8]).abs().max() > 1e-3


def test_a_frozen_sample_is_a_merged_plain_linear_model(model):
    """The sample's A written over the mean, merged by PEFT into the base weights, run as a model without LoRA."""
    ids = random_ids(4, 9)
    with model.posterior_samples(1, seed=2):
        expected = model(input_ids=ids).logits
    for layer in gaussian_layers(model).values():
        layer.weight.data.copy_(layer.draw(Sampling(1, seed=2))[0])
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_samples_are_the_same_for_any_batch_size_and_leave_the_global_random_state(model):
    ids = random_ids(6, 9)
    state = torch.get_rng_state()
    with model.posterior_samples(2, seed=1):
        whole = model(input_ids=ids.repeat(2, 1)).logits.view(2, 6, -1)
    with model.posterior_samples(2, seed=1):
        part = model(input_ids=ids[:2].repeat(2, 1)).logits.view(2, 2, -1)
    torch.testing.assert_close(whole[:, :2], part)
    assert torch.equal(torch.get_rng_state(), state)


def test_posterior_mean_holds_in_train_mode_and_inside_samples(model):
    ids = random_ids(4, 9)
    expected = model(input_ids=ids).logits
    with model.posterior_samples(2, seed=0), model.posterior_mean():
        assert torch.equal(model(input_ids=ids).logits, expected)
    for module in model.modules():
        if "lora_A" in type(module).__name__ or module in gaussian_layers(model).values():
            module.train()
    assert not torch.equal(model(input_ids=ids).logits, expected)
    with model.posterior_mean():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_statistics_and_kl_agree_with_the_parameters(model):
    layers = gaussian_layers(model)
    statistics = model.posterior_statistics()
    expected = sum(kl_divergence(Normal(m.weight, m.std), Normal(0.0, 0.2)).sum().item() for m in layers.values())
    assert model.kl_divergence().item() == pytest.approx(expected, rel=1e-5)
    assert statistics.total.kl == pytest.approx(expected, rel=1e-5)
    stds = torch.cat([m.std.detach().flatten() for m in layers.values()])
    means = torch.cat([m.weight.detach().flatten() for m in layers.values()])
    assert statistics.total.num_weights == len(stds)
    assert statistics.total.mean_std == pytest.approx(stds.mean().item(), rel=1e-5)
    assert mean_posterior_std(model).item() == pytest.approx(stds.mean().item(), rel=1e-5)
    assert (statistics.total.min_std, statistics.total.max_std) == (stds.min().item(), stds.max().item())
    assert statistics.total.signal_to_noise == pytest.approx((means.abs() / stds).mean().item(), rel=1e-4)
    assert set(statistics.layers) == set(layers) and statistics.to_dict()["total"]["kl"] == statistics.total.kl


def test_kl_is_differentiable_to_means_and_stds(model):
    model.kl_divergence().backward()
    for layer in gaussian_layers(model).values():
        assert layer.weight.grad is not None and layer.rho.grad is not None


def test_bad_input():
    lora = get_peft_model(TINY["bert"](), LoraConfig(target_modules=["query"]))
    with pytest.raises(BlobError, match="no posterior"), posterior_samples(lora, 2):
        pass
    blob = get_blob_model(TINY["bert"](), BlobConfig(target_modules=["query"]))
    with pytest.raises(BlobError, match="num_samples must be >= 1, got 0"), blob.posterior_samples(0):
        pass
    blob.merge_adapter()
    with pytest.raises(BlobError, match="merged into the base weights"), blob.posterior_samples(2):
        pass
    with pytest.raises(BlobError, match="no LoRA layers of an adapter named 'other'"):
        attach_posterior(lora, BlobConfig(), "other")
    with pytest.raises(BlobError, match="embedding"):
        get_blob_model(TINY["bert"](), BlobConfig(target_modules=["word_embeddings"]))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

    with pytest.raises(BlobError, match="conv is Conv2d: its A is a convolution"):
        attach_posterior(get_peft_model(Net(), LoraConfig(target_modules=["conv"])), BlobConfig(), "default")
