"""The arithmetic of docs/distributed.md against the bytes that a training and an evaluation really hold."""

import re

import pytest
import torch
from helpers.models import tiny_bert
from helpers.running import ROOT
from peft import LoraConfig
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from blob_hf import BlobConfig, BlobError, get_blob_model
from blob_hf.trainer.kl.step import DecoupledKLStep
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.in_flight import frozen_now
from blob_hf.tuner.memory import memory_of
from blob_hf.tuner.posterior import gaussian_layers

TARGETS = ["q_proj", "v_proj", "lm_head"]


def llama(layers=2, **changes):
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def blob(base=None, **lora):
    return get_blob_model(base or llama(), BlobConfig(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM"} | lora))


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}])
def test_state_is_that_of_a_training_and_samples_those_in_flight(lora):
    model = blob(llama().bfloat16(), **lora)
    found = memory_of(model, num_samples=3)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    step = DecoupledKLStep(optimizer, model, 0.2, "square", 0.01)
    step.weight = 1.0
    ids = torch.randint(0, 100, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    rhos = [layer.rho for layer in gaussian_layers(model).values()]
    assert found.base == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert found.std == sum(rho.nbytes for rho in rhos)
    assert found.adapter == sum(p.nbytes for p in trained) - found.std
    assert found.gradients == sum(p.grad.nbytes for p in trained) == found.adapter + found.std
    assert found.optimizer == sum(t.nbytes for t in kept)
    with model.posterior_samples(3):
        assert found.samples == sum(frozen_now(layer).weight.nbytes for layer in gaussian_layers(model).values())


@pytest.mark.parametrize("row", [1, 10**6])
def test_the_kl_step_allocates_a_few_rows(row, monkeypatch):
    """Rows of one layer each, and all layers in one."""
    monkeypatch.setattr("blob_hf.tuner.rows.ROW", row)
    monkeypatch.setattr("blob_hf.tuner.memory.ROW", row)
    model = blob()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step = DecoupledKLStep(optimizer, model, 0.2, "square", 0.01)
    step.weight, step._unseen = 1.0, None
    with torch.profiler.profile(profile_memory=True) as profile:
        step._after_step(optimizer, (), {})
    total = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    assert memory_of(model).kl_step / 2 < peak <= memory_of(model).kl_step


def test_what_layers_start_from_grows_as_said_with_the_layers():
    """Bytes that a checkpointed forward keeps, of four layers less those of two."""

    def kept(layers):
        model = blob(llama(layers)).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        seen = {}

        def pack(tensor):
            seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(input_ids=torch.randint(0, 100, (3, 8)))
        del output
        return sum(seen.values()), memory_of(model, batch_size=3, length=8).activations

    (four, expected_four), (two, expected_two) = kept(4), kept(2)
    assert four - two == expected_four - expected_two == 2 * 3 * 8 * 64 * 4


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_those_of_bitsandbytes(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    llama().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}), device_map="cpu",
        dtype=torch.bfloat16,
    )  # fmt: skip
    counted = sum(p.nbytes for p in base.parameters())
    for module in base.modules():
        weight = getattr(module, "weight", None)
        for scale in (getattr(weight, "SCB", None), getattr(getattr(weight, "quant_state", None), "absmax", None)):
            counted += scale.nbytes if scale is not None else 0
    assert memory_of(blob(llama().bfloat16()), bits=bits).base == counted


SIZES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip


def test_the_table_of_the_docs():
    """Llama-2's sizes with the published adapter, on the meta device."""
    rows = {}
    for line in (ROOT / "docs" / "distributed.md").read_text().splitlines():
        if line.startswith(("| 7B", "| 13B", "| 70B")):
            name, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
            rows[name] = [float(re.match(r"[\d.]+", cell).group()) for cell in cells]
    assert list(rows) == list(SIZES)
    for name, size in SIZES.items():
        with torch.device("meta"):
            base = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **size)).bfloat16()
        model = blob(base, r=8)
        whole = memory_of(model, batch_size=4, length=300, logits=False).gigabytes()
        bases = [memory_of(model, bits=bits).gigabytes()["base"] for bits in (None, 8, 4)]
        state = whole["adapter"] + whole["std"] + whole["gradients"] + whole["optimizer"]
        cells = [*bases, state, whole["samples"], whole["activations"], whole["base"] + state + whole["activations"]]
        cells.append(cells[2] + state + whole["activations"])
        assert rows[name] == [float(f"{cell:.2f}") for cell in cells], [f"{cell:.2f}" for cell in cells]


def test_mistakes_are_one_line():
    with pytest.raises(BlobError, match="bits must be 8, 4 or None, got 3"):
        memory_of(blob(), bits=3)
    with pytest.raises(BlobError, match="no posterior"):
        memory_of(get_lora_model(tiny_bert(), LoraConfig(target_modules=["query"])))
