"""Evaluation with as many samples as each input needs, in trainers and arguments."""

import numpy as np
import pytest
from helpers.training import arguments, blob_bert, rows, trainer

from blob_hf import BlobSeq2SeqTrainingArguments
from blob_hf.inference.predict import predict_classes
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError


def test_an_evaluation_says_how_many_networks_inputs_took(tmp_path):
    one = trainer(tmp_path, blob_bert(init_eps=0.9), eval_samples="auto", eval_tolerance=0.01, eval_seed=3)
    one.train()
    output = one.predict(rows(13, seed=1))
    networks = output.predictions.networks
    assert networks.shape == (13,) and set(networks) <= {2, 4, 6, 8, 12, 24}
    assert output.metrics["test_networks"] == pytest.approx(networks.mean())
    assert one.evaluate()["eval_networks"] == pytest.approx(networks.mean())
    inputs = {"input_ids": one.eval_dataset.with_format("torch")["input_ids"][:]}
    whole = predict_classes(one.model.eval(), inputs, Sampling(24, 3, "antithetic")).sample_log_probs.numpy()
    for row, count in enumerate(networks):
        expected = np.log(np.exp(whole[row, :count]).mean(0))
        np.testing.assert_allclose(output.predictions.log_probs[row], expected, atol=1e-4)
    plain = trainer(tmp_path, one.model, eval_samples=4)
    assert plain.predict(rows(13, seed=1)).predictions.networks is None and "eval_networks" not in plain.evaluate()


def test_arguments_of_the_samples(tmp_path):
    assert arguments(tmp_path, eval_samples="auto").sampling == Sampling.auto()
    assert arguments(tmp_path, eval_samples="5", eval_layers=2).sampling == Sampling(5, layers=2)
    assert arguments(tmp_path, eval_samples=8, eval_tolerance=0.1, draw="qmc").sampling == Sampling(
        8, draw="qmc", tolerance=0.1
    )
    for wrong, match in (
        ({"eval_samples": "some"}, "a whole number or 'auto', got 'some'"),
        ({"eval_samples": 2.5}, "a whole number or 'auto', got '2.5'"),
        ({"eval_samples": -1}, "^eval_samples must be >= 0, got -1"),
        ({"eval_tolerance": 0.0}, "^eval_tolerance must be > 0, got 0"),
        ({"eval_layers": 0}, "^eval_layers must be >= 1, got 0"),
    ):
        with pytest.raises(BlobError, match=match):
            arguments(tmp_path, **wrong)
    with pytest.raises(BlobError, match="is for classes and choices"):
        BlobSeq2SeqTrainingArguments(str(tmp_path), eval_samples="auto", report_to="none")
