"""The head's rows of a few tokens, against the whole head of the same model."""

import threading

import pytest
import torch
from helpers.models import randomize_b
from peft import LoraConfig
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from blob_hf import BlobConfig, Sampling, get_blob_model, get_lora_model
from blob_hf.baselines.ivon import attach_ivon
from blob_hf.inference import cut_head as module
from blob_hf.inference.cut_head import cut_head
from blob_hf.tuner.posterior import gaussian_layers

TOKENS = (7, 3, 11, 48)
VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip


def llama(tied=False):
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def with_bias():
    model = llama()
    model.lm_head = nn.Linear(16, VOCABULARY)
    return model


def soft_capped():
    """Logits that the cap bends: without it they would differ by more than any tolerance."""
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5))
    model.get_input_embeddings().weight.data.mul_(30)
    return model


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32))


MODELS = {
    "published": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "plain head": (llama, {"target_modules": ["q_proj"]}),
    "tied": (lambda: llama(tied=True), {"target_modules": ["q_proj"]}),
    "tied, targeted": (lambda: llama(tied=True), {"target_modules": ["q_proj", "lm_head"]}),
    "trained in full": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "bias": (with_bias, {"target_modules": ["q_proj", "lm_head"], "lora_bias": False}),
    "soft cap": (soft_capped, {"target_modules": ["q_proj", "lm_head"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "lm_head"]}),
}


def blob(kind="published"):
    torch.manual_seed(0)
    make, lora = MODELS[kind]
    model = get_blob_model(make(), BlobConfig(**lora, task_type="CAUSAL_LM", init_eps=0.8, r=4))
    randomize_b(model)
    return model.eval()


def ids(rows=3):
    return torch.randint(0, VOCABULARY, (rows, 6), generator=torch.Generator().manual_seed(1))


def whole(model, **inputs):
    return model(**inputs, logits_to_keep=1).logits[:, -1].index_select(1, torch.tensor(TOKENS))


def cut(model, **inputs):
    with cut_head(model, TOKENS) as request:
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]
    assert request.done and logits.shape[-1] == len(TOKENS)
    return logits


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_the_whole_head_for_the_mean_and_samples(kind):
    model, inputs = blob(kind), {"input_ids": ids()}
    with torch.no_grad():
        torch.testing.assert_close(cut(model, **inputs), whole(model, **inputs))
        with model.posterior_samples(Sampling(3, seed=1), repeat=True):
            found, expected = cut(model, **inputs), whole(model, **inputs)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[:3], found[3:6])  # samples that differ
    assert model(**inputs).logits.shape[-1] == VOCABULARY  # and outside of the block it is whole


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_the_whole_head(kind):
    model, grads = blob(kind).train(), []
    for layer in gaussian_layers(model).values():
        layer.noise = "shared"  # one draw, by the global generator alone
    for run in (whole, cut):
        torch.manual_seed(3)
        loss = torch.nn.functional.cross_entropy(run(model, input_ids=ids()), torch.tensor([0, 3, 1]))
        model.zero_grad()
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)
    assert any(grad.abs().sum() > 0 for name, grad in grads[0].items() if "rho" in name)
    if kind == "trained in full":
        assert grads[1]["base_model.model.lm_head.modules_to_save.default.weight"].abs().sum() > 0


def test_rows_that_choose_their_adapter():
    model = blob()
    model.add_adapter("other", BlobConfig(target_modules=["lm_head"], task_type="CAUSAL_LM", r=2))
    randomize_b(model)
    inputs = {"input_ids": ids(), "adapter_names": ["other", "default", "__base__"]}
    with torch.no_grad():
        torch.testing.assert_close(cut(model, **inputs), whole(model, **inputs))


class Quantised(nn.Linear):
    """Stands for a layer that computes in its own way."""


def dora():
    return get_lora_model(llama(), LoraConfig(target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM"))


def sampled_b():
    lora = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    return attach_ivon(get_lora_model(llama(), lora))


def quantised():
    base = llama()
    base.lm_head = Quantised(16, VOCABULARY, bias=False)
    return get_blob_model(base, BlobConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("make, reason", [(dora, "Dora"), (sampled_b, "NewtonLinear"), (quantised, "Quantised")])
def test_a_head_that_cannot_be_cut_is_whole_and_the_log_says_so_once(make, reason, caplog, monkeypatch):
    monkeypatch.setattr(module, "_told", set())
    model = make().eval()
    with caplog.at_level("DEBUG", "blob_hf"), torch.no_grad(), cut_head(model, TOKENS) as request:
        for _ in range(2):
            assert model(input_ids=ids()).logits.shape[-1] == VOCABULARY
    assert not request.done
    assert len([record for record in caplog.records if "not cut" in record.message]) == 1 and reason in caplog.text


def test_other_threads_have_the_whole_head_meanwhile():
    model, shapes = blob(), []
    with torch.no_grad(), cut_head(model, TOKENS):
        thread = threading.Thread(target=lambda: shapes.append(model(input_ids=ids()).logits.shape[-1]))
        thread.start(), thread.join()
        shapes.append(model(input_ids=ids()).logits.shape[-1])
    assert shapes == [VOCABULARY, len(TOKENS)]


def test_an_error_in_the_head_leaves_nothing_behind():
    model = blob()
    with torch.no_grad(), cut_head(model, TOKENS), pytest.raises(RuntimeError):
        model.get_output_embeddings()(torch.ones(1, 3))
    weight = model.get_output_embeddings().get_base_layer().weight
    assert nn.functional.linear(torch.ones(1, 16), weight).shape[-1] == VOCABULARY


@pytest.mark.slow
def test_a_compiled_model_has_the_whole_head():
    model, expected = blob(), whole(blob(), input_ids=ids())
    cut(model, input_ids=ids())
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    with torch.no_grad(), cut_head(model, TOKENS) as request:
        found = whole(compiled, input_ids=ids())
    assert not request.done
    torch.testing.assert_close(found, expected)
