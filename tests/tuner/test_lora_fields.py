"""Every field of PEFT's `LoraConfig`: it works with a posterior as without, or is refused with the reason."""

import copy
import dataclasses
import warnings

import pytest
import torch
from helpers.adapters import inputs_for, logits
from helpers.models import TINY, randomize_b
from helpers.peft_features import DOCUMENT, FEATURES, Feature, rendered
from peft import LoraConfig, PeftModel

from blob_hf import BlobConfig, BlobModel, get_blob_model
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.utils.errors import BlobError

# Fields that take ways of their own through our code: these rows are tried in every run, the others with `-m slow`.
QUICK = {
    "bias", "fan_in_fan_out", "init_lora_weights", "layer_replication", "lora_bias", "modules_to_save", "rank_pattern",
    "target_modules", "trainable_token_indices",
}  # fmt: skip
WORKING = [feature for feature in FEATURES if feature.outcome == "works"]
REFUSED = [feature for feature in FEATURES if feature.outcome == "refused"]


def named(feature: Feature) -> str:
    return f"{feature.field}={feature.text}"


def row(feature: Feature) -> object:
    first = next(one for one in WORKING if one.field == feature.field)
    marks = () if feature is first and feature.field in QUICK else pytest.mark.slow
    return pytest.param(feature, marks=marks, id=named(feature))


@pytest.mark.parametrize("feature", [row(feature) for feature in WORKING])
def test_works(feature, tmp_path):
    base, inputs = TINY[feature.family](), inputs_for(feature.family)
    (tmp_path / "README.md").write_text("A card, so that none is made.")
    original = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's: of fields that another one switches on, of those it does not know
        model = get_blob_model(base, BlobConfig(**feature.config(init_eps=0.9)))
        randomize_b(model)
        train(model, feature, inputs)
        model.eval().save_pretrained(tmp_path)
        loaded = BlobModel.from_pretrained(tmp_path, model=copy.deepcopy(original))
        plain = PeftModel.from_pretrained(original, tmp_path).eval()
    mean = logits(model, inputs)
    assert torch.equal(logits(loaded, inputs), mean) and torch.equal(logits(plain, inputs), mean)
    with model.posterior_samples(1, seed=3), loaded.posterior_samples(1, seed=3):
        sample = logits(model, inputs)
        assert torch.equal(logits(loaded, inputs), sample) and not torch.equal(sample, mean)


def train(model, feature, inputs):
    """A step in which every std and every trained weight has a gradient."""
    trained = [value for value in model.parameters() if value.requires_grad]
    assert bool(trained) == feature.trains
    if trained:
        model.train()(**inputs).logits.square().sum().backward()
        assert all(layer.rho.grad.abs().sum() > 0 for layer in gaussian_layers(model).values())
        torch.optim.SGD(trained, lr=0.01).step()


@pytest.mark.parametrize("feature", REFUSED, ids=named)
def test_refused(feature):
    with warnings.catch_warnings(), pytest.raises(BlobError, match=feature.error) as error:
        warnings.simplefilter("ignore")
        get_blob_model(TINY[feature.family](), BlobConfig(**feature.config()))
    assert "\n" not in str(error.value)


def test_no_field_is_forgotten():
    assert {feature.field for feature in FEATURES} == {field.name for field in dataclasses.fields(LoraConfig)}
    assert len(WORKING) + len(REFUSED) == len(FEATURES)


def test_the_documentation_has_this_table():
    assert DOCUMENT.read_text(encoding="utf-8") == rendered(DOCUMENT.read_text(encoding="utf-8"))
