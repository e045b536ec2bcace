"""Adapters with a posterior in the last layers alone: plain LoRA below."""

import peft
import pytest
import torch
from helpers.models import TARGETS, random_ids, randomize_b, tiny_bart, tiny_bert
from helpers.training import blob_bert, parameters, trainer
from test_trunk import rows_of_layers
from torch import nn

from blob_hf import BlobConfig, BlobModel, Sampling, get_blob_model
from blob_hf.inference.predict import predict_classes
from blob_hf.tuner.posterior import gaussian_layers, sampled_layers
from blob_hf.utils.errors import BlobError

LAST = {"bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.1.attention.self.value", "classifier"}


def test_only_the_last_layers_have_a_posterior_whoever_makes_it():
    config = BlobConfig(target_modules=TARGETS["bert"], posterior_layers=1)
    for model in (get_blob_model(tiny_bert(), config), peft.get_peft_model(tiny_bert(), config)):
        assert set(gaussian_layers(model)) == LAST
        lower = [
            module for path, module in model.named_modules() if "layer.0" in path and path.endswith("lora_A.default")
        ]
        assert len(lower) == 2 and all(type(one) is nn.Linear for one in lower)
        assert all(one.weight.requires_grad for one in lower)
    every = get_blob_model(tiny_bert(), BlobConfig(target_modules=TARGETS["bert"], posterior_layers=2))
    assert len(gaussian_layers(every)) == 5
    config = BlobConfig(target_modules=TARGETS["bart"], posterior_layers=3)  # two of the decoder, one of the encoder
    parts = {name.rsplit(".self_attn", 1)[0] for name in gaussian_layers(get_blob_model(tiny_bart(), config))}
    assert {part for part in parts if "encoder_attn" not in part} == {
        "model.encoder.layers.1", "model.decoder.layers.0", "model.decoder.layers.1", "lm_head",
    }  # fmt: skip


def test_samples_are_those_of_the_last_layers_of_a_whole_posterior_and_share_the_trunk():
    torch.manual_seed(0)
    whole = get_blob_model(tiny_bert(), BlobConfig(target_modules=TARGETS["bert"], init_eps=0.9)).eval()
    randomize_b(whole)
    part = get_blob_model(tiny_bert(), BlobConfig(target_modules=TARGETS["bert"], posterior_layers=1)).eval()
    part.load_state_dict(whole.state_dict(), strict=False)
    inputs = {"input_ids": random_ids(3, 7)}
    expected = predict_classes(whole, inputs, Sampling(4, 1, layers=1))
    with rows_of_layers(part) as rows:
        found = predict_classes(part, inputs, Sampling(4, 1))
    torch.testing.assert_close(found.sample_log_probs, expected.sample_log_probs, atol=1e-5, rtol=1e-5)
    assert rows == [(0, 3), (1, 3), (0, 3), (1, 12)]  # the mean's forward, and one for all samples


def test_saved_and_loaded_to_the_bit(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    base = type(tiny_bert()).from_pretrained
    model = get_blob_model(
        base(tmp_path / "base"), BlobConfig(target_modules=["query", "value"], init_eps=0.9, posterior_layers=1)
    )
    randomize_b(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = BlobModel.from_pretrained(tmp_path / "adapter", model=base(tmp_path / "base")).eval()
    assert loaded.blob_config.posterior_layers == 1 and len(sampled_layers(loaded)) == 2
    inputs = {"input_ids": random_ids(3, 7)}
    with model.posterior_samples(2, repeat=True), loaded.posterior_samples(2, repeat=True), torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    plain = peft.PeftModel.from_pretrained(base(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(plain(**inputs).logits, loaded(**inputs).logits)


def test_training_moves_the_stds_of_the_last_layers_and_the_weights_of_all(tmp_path):
    one = trainer(tmp_path, blob_bert(posterior_layers=1), kl_learning_rate=0.01)
    before = parameters(one.model)
    assert sum("rho" in name for name in before) == 3
    kl = one.model.kl_divergence().item()
    one.train()
    after = parameters(one.model)
    assert all(not torch.equal(before[name], after[name]) for name in before if "lora_" in name)
    closed = sum(layer.kl(0.2).item() for layer in gaussian_layers(one.model).values())
    assert one.model.kl_divergence().item() == pytest.approx(closed) and closed < kl


def test_layers_that_there_are_not_are_refused():
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(BlobError, match="posterior_layers must be an integer >= 1"):
            BlobConfig(posterior_layers=wrong)
    with pytest.raises(BlobError, match="last layers must be 1 to 2, .* got 3"):
        get_blob_model(tiny_bert(), BlobConfig(target_modules=["query"], posterior_layers=3))
    with pytest.raises(BlobError, match="no LoRA layer is in the last 1 layers"):
        get_blob_model(tiny_bert(), BlobConfig(target_modules=["query"], posterior_layers=1, layers_to_transform=[0]))
