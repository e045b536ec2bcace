"""MC dropout against torch's own dropout with the same masks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.models import TARGETS, random_ids, randomize_b, tiny_bart, tiny_bert
from peft import LoraConfig
from torch import nn

from blob_hf import BlobError
from blob_hf.baselines import attach_mc_dropout
from blob_hf.baselines.mc_dropout import MaskedA
from blob_hf.inference.generate import generate_samples
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.posterior import sampled_layers
from blob_hf.tuner.sampling import Sampling


def layer(rate=0.25, width=4000):
    torch.manual_seed(0)
    return MaskedA(nn.Linear(width, 3, bias=False), "layer", rate)


def test_a_sample_is_torchs_dropout_with_one_mask():
    one = layer()
    # torch's dropout of a row of ones: 0 or 1 / (1 - p)
    torch.manual_seed(1)
    scaled = F.dropout(torch.ones(one.in_features), p=0.25)
    one.masks = lambda _: (scaled > 0).unsqueeze(0)
    x = torch.randn(5, 7, one.in_features)
    torch.manual_seed(1)
    expected = F.linear(x * F.dropout(torch.ones(one.in_features), p=0.25), one.weight)
    with one.frozen_samples(Sampling(1, seed=0)):
        torch.testing.assert_close(one(x), expected)


def test_masks_keep_features_with_probability_one_minus_p_and_the_mean_is_the_weight():
    one = layer()
    kept = one.masks(Sampling(200)).float()
    # 800,000 Bernoulli draws: std of the mean 5e-4; features are independent of one another
    assert abs(kept.mean().item() - 0.75) < 2e-3
    assert not torch.equal(kept[0], kept[1]) and torch.equal(kept[3], one.masks(Sampling(1, first=3))[0].float())
    drawn = one.draw(Sampling(200, 0))
    assert drawn.shape == (200, 3, 4000)
    ratio = (drawn.mean(0) / one.weight).mean().item()  # its std is that of the mean above, times 4/3
    assert abs(ratio - 1) < 3e-3


def test_antithetic_masks_are_complementary_where_they_can_be():
    half = layer(rate=0.5)
    for draw in ("antithetic", "qmc"):
        one, other = half.masks(Sampling(2, 0, draw))
        assert torch.equal(one, ~other)
    assert torch.equal(half.masks(Sampling(1, 0, "antithetic")), half.masks(Sampling(1, 0)))


def test_rows_of_a_block_share_the_mask_and_blocks_have_their_own():
    one = layer(width=50)
    x = torch.randn(2, 4, 50)
    with one.frozen_samples(Sampling(3, seed=5, first=1)):
        out = one(x.repeat(3, 1, 1)).view(3, 2, 4, 3)
    for s in range(3):
        masked = x * one.masks(Sampling(1, 5, first=1 + s))[0] / 0.75
        torch.testing.assert_close(out[s], F.linear(masked, one.weight))


def test_a_whole_network_with_frozen_masks_is_the_network_with_dropped_inputs():
    config = LoraConfig(target_modules=TARGETS["bert"], r=4, lora_dropout=0.3)
    model = get_lora_model(tiny_bert(), config).eval()
    randomize_b(model)
    attach_mc_dropout(model)
    ids = random_ids(4, 9)
    plain = model(input_ids=ids).logits
    with model.posterior_samples(3, seed=7):
        together = model(input_ids=ids.repeat(3, 1)).logits.view(3, 4, -1)
    layers = sampled_layers(model)
    assert len(layers) == 5 and all(isinstance(layer, MaskedA) for layer in layers)
    for s in range(3):
        hooks = [
            layer.register_forward_pre_hook(
                lambda module, args, s=s: (args[0] * module.masks(Sampling(1, 7, first=s))[0] / 0.7,)
            )
            for layer in layers
        ]
        torch.testing.assert_close(model(input_ids=ids).logits, together[s], atol=1e-5, rtol=1e-5)
        for hook in hooks:
            hook.remove()
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    torch.testing.assert_close(model(input_ids=ids).logits, plain)  # N=0 is the network without dropout


def test_one_mask_is_held_for_a_whole_generation():
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_dropout=0.3, task_type="SEQ_2_SEQ_LM")
    model = get_lora_model(tiny_bart(), config).eval()
    randomize_b(model, 5.0)
    attach_mc_dropout(model)
    ids = random_ids(2, 7)
    texts = generate_samples(model, {"input_ids": ids}, Sampling(4, seed=1), max_new_tokens=6, do_sample=False)
    for s in range(4):
        fixed = copy.deepcopy(model)  # one network, masked once and for all
        for layer in sampled_layers(fixed):
            layer.fix_at_sample(Sampling(1, seed=1, first=s))
        alone = fixed.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert texts[:, s, : alone.shape[1]].tolist() == alone.tolist()
    assert len({tuple(row) for row in texts[0].tolist()}) > 1


def test_training_uses_pefts_dropout_and_no_dropout_is_refused():
    model = get_lora_model(tiny_bert(), LoraConfig(target_modules=["query"], r=4, lora_dropout=0.5))
    randomize_b(model)
    attach_mc_dropout(model)
    ids = random_ids(2, 9)
    model.train()
    for module in model.modules():  # the backbone's own is off, as in our training
        if isinstance(module, nn.Dropout) and module.p == 0.1:
            module.p = 0.0
    assert not torch.allclose(model(input_ids=ids).logits, model(input_ids=ids).logits)
    without = get_lora_model(tiny_bert(), LoraConfig(target_modules=["query"], r=4))
    with pytest.raises(BlobError, match="lora_dropout > 0, got 0"):
        attach_mc_dropout(without)
