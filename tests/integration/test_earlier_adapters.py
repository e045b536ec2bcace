"""Adapters as version 0.1 saved them, before its rooms were rearranged, load unchanged.

fixtures/adapters_0_1 holds a tiny base model, a BLoB adapter, a Laplace-LoRA one (whose temperatures were in
method.json then), and what that version predicted with them.
"""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForSequenceClassification

from blob_hf import BlobModel, Sampling, predict_classes
from blob_hf.baselines import LaplaceState, Temperatures
from blob_hf.baselines.linearized import Linearized
from blob_hf.inference.predict import sampled_prediction
from blob_hf.tuner.draws import standard_normal

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "adapters_0_1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
INPUTS = {"input_ids": torch.tensor(EXPECTED["input_ids"])}


def load(name):
    base = BertForSequenceClassification.from_pretrained(FOLDER / "base")
    return BlobModel.from_pretrained(FOLDER / name, model=base)


def check(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_a_blob_adapter_predicts_as_it_did():
    model = load("blob")
    found = predict_classes(model, INPUTS, Sampling(3, seed=5))
    assert model.method == "blob" and model.has_posterior
    check(found.mean_log_probs, EXPECTED["blob"]["mean"])
    check(found.sample_log_probs, EXPECTED["blob"]["samples"])


def test_a_laplace_adapter_predicts_as_it_did_and_keeps_its_temperatures(tmp_path):
    model = load("laplace")
    found, expected = predict_classes(model, INPUTS, Sampling(3)), EXPECTED["laplace"]
    check(found.mean_log_probs, expected["mean"])
    check(drawn_by_eigenvectors(model, Sampling(3), expected["samples"]), expected["samples"])
    check(sampled_prediction(model, INPUTS, Sampling(3)).sample_log_probs, expected["sampled"])
    assert model.companion("method") == LaplaceState(pytest.approx(0.0243258923), "marglik", "all", 30)
    assert model.companion("temperature") == Temperatures(predictive=1.5, mean=1.25)
    model.save_pretrained(tmp_path)
    again = BlobModel.from_pretrained(tmp_path, model=BertForSequenceClassification.from_pretrained(FOLDER / "base"))
    assert again.companions == model.companions
    torch.testing.assert_close(predict_classes(again, INPUTS, Sampling(3)).sample_log_probs, found.sample_log_probs)


def drawn_by_eigenvectors(model, sampling, expected):
    """Samples of the linearised network as version 0.1 drew them: by V sqrt(values), of the signs of V that fit best.

    Today's root is the symmetric one: other draws of the same Gaussian, which is what is compared here.
    """
    linear = Linearized.of(model, INPUTS)
    values, vectors = torch.linalg.eigh(linear.covariance())
    noise = standard_normal("logits", sampling, linear.mean.shape[-1:])
    rows = []
    for row, wanted in enumerate(torch.tensor(expected)):
        root = vectors[row] * values[row].clamp(min=0).sqrt()
        turned = [root * torch.tensor(signs) for signs in product((1.0, -1.0), repeat=len(root))]
        drawn = [F.log_softmax(linear.mean[row] + noise @ one.T, dim=-1) for one in turned]
        rows.append(min(drawn, key=lambda one, wanted=wanted: float((one - wanted).abs().max())))
    return torch.stack(rows)
