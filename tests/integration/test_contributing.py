"""CONTRIBUTING's example of a baseline is run as it is written there."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import saved_base
from helpers.models import TARGETS, random_ids, randomize_b
from helpers.running import ROOT
from torch import Tensor, nn
from transformers import PreTrainedModel

from blob_hf import BlobModel, Sampling, predict_classes
from blob_hf.baselines import base
from blob_hf.baselines.base import MethodState, register_method
from blob_hf.cli.route import Route
from blob_hf.reporting.run_summary import MethodCard
from blob_hf.tuner.draws import standard_normal
from blob_hf.tuner.posterior import lora_layers
from blob_hf.tuner.sampled import SampledLinear, layer_name

# What the example's imports would be.
NAMES = {
    one.__name__: one
    for one in (
        Mapping, dataclass, Path, Tensor, PreTrainedModel, BlobModel, Sampling, MethodState, register_method, Route,
        MethodCard, lora_layers, SampledLinear, layer_name, standard_normal,
    )
}  # fmt: skip


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))  # it is registered for this test alone
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a baseline")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    names = {**NAMES, "Any": Any, "nn": nn, "torch": torch, "__name__": "example"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    return names


def test_the_example_baseline_is_made_saved_and_found_by_its_name(example, tmp_path):
    lora = {"target_modules": TARGETS["bert"], "r": 4}
    model = example["NoiseRoute"]().fresh_model(saved_base("bert", tmp_path / "base"), lora, {}).eval()
    randomize_b(model)
    inputs, drawn = {"input_ids": random_ids(4, 8)}, Sampling(3, seed=2)
    found = predict_classes(model, inputs, drawn)
    assert (found.sample_log_probs[:, 0] - found.sample_log_probs[:, 1]).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "noise")
    assert "noisy LoRA adapter" in (tmp_path / "noise" / "README.md").read_text()
    loaded = BlobModel.from_pretrained(tmp_path / "noise")
    assert loaded.method == "noise" and loaded.companion("method") == example["NoiseState"](0.1)
    torch.testing.assert_close(predict_classes(loaded, inputs, drawn).sample_log_probs, found.sample_log_probs)
