"""Every public method of PEFT's models, with a posterior: what docs/peft.md says of it has a test."""

import re
from pathlib import Path

import pytest
import torch
from helpers.models import random_ids, randomize_b, tiny_bert
from helpers.peft_features import METHODS
from peft import PeftModel
from peft.tuners.lora import LoraModel

from blob_hf import BlobConfig, get_blob_model
from blob_hf.tuner.posterior import gaussian_layers

TESTS = Path(__file__).resolve().parents[1]
OUTSIDE = {"tuner_layer_cls"}  # a class, not a method
OF_PROMPTS = {"get_prompt", "get_prompt_embedding_to_save"}  # of prompt learning, which has no LoRA


def public(kind: type) -> set[str]:
    own = {name for base in kind.__mro__[:2] for name in vars(base) if not name.startswith("_")}
    return {name for name in own if callable(getattr(kind, name))} - {name for name in dir(torch.nn.Module)}


def test_no_method_is_forgotten_and_each_has_its_test():
    wanted = (public(PeftModel) | public(LoraModel) | {"forward"}) - OUTSIDE - OF_PROMPTS - {"push_to_hub"}
    assert wanted <= {method.name for method in METHODS}
    for method in METHODS:
        file, _, function = method.proof.partition("::")
        text = (TESTS / file).read_text(encoding="utf-8")
        body = re.search(rf"^def {function}\(.*?(?=^\S|\Z)", text, re.M | re.S)
        assert body, method.proof
        if method.outcome == "refused":
            assert re.search(r"raises\(BlobError|one_line\(", body.group()), method.proof


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = get_blob_model(tiny_bert(), BlobConfig(target_modules=["query", "value"], init_eps=0.8))
    randomize_b(model)
    return model.eval()


def test_a_switched_off_adapter_is_the_base_model_also_for_samples(model):
    ids = random_ids(2, 6)
    with torch.no_grad(), model.posterior_samples(2, repeat=True):
        noisy = model(input_ids=ids).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        model.base_model.disable_adapter_layers()
        torch.testing.assert_close(model(input_ids=ids).logits, off)
        model.base_model.enable_adapter_layers()
        assert torch.equal(model(input_ids=ids).logits, noisy)
        base = model.unload()
        torch.testing.assert_close(base(input_ids=ids.repeat(2, 1)).logits, off)
    assert (noisy - off).abs().max() > 1e-3 and not gaussian_layers(base)


def test_what_peft_counts_and_shows(model, capsys):
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layers = gaussian_layers(model).values()
    assert model.get_nb_trainable_parameters()[0] == trained >= sum(2 * layer.rho.numel() for layer in layers)
    model.print_trainable_parameters()
    assert f"{trained:,d}" in capsys.readouterr().out
    assert model.get_model_status().trainable_params == trained and model.get_model_status().enabled
    assert len(model.get_layer_status()) == len(layers)
    assert model.get_base_model().config.model_type == model.base_model.get_model_config(model)["model_type"] == "bert"
    model.set_requires_grad("default", False)
    assert not any(layer.rho.requires_grad for layer in layers)


def test_gradient_checkpointing_draws_the_same_noise_twice():
    """The recomputed forward has the noise of the first: gradients are those without checkpointing."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_blob_model(tiny_bert(), BlobConfig(target_modules=["query", "value"], init_eps=0.8))
        randomize_b(model)
        model.train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.prepare_model_for_gradient_checkpointing(model.get_base_model())
        torch.manual_seed(1)
        model(input_ids=random_ids(3, 6)).logits.square().sum().backward()
        gradients.append([layer.rho.grad for layer in gaussian_layers(model).values()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
