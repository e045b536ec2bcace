"""Balanced class weights, against scikit-learn's weights and torch's weighted loss on one big batch."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.models import TARGETS, randomize_b, tiny_bert
from helpers.training import blob_bert, rows, trainer
from peft import LoraConfig
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from blob_hf import BlobSeq2SeqTrainingArguments, get_lora_model
from blob_hf.trainer.class_weights import balanced_weights
from blob_hf.utils.errors import BlobError


def uneven(count=24):
    """Rows whose first half has mostly the class 0, the second all three alike."""
    labels = [[0, 0, 0, 1, 0, 2, 0][index % 7] if index < count // 2 else index % 3 for index in range(count)]
    return rows(count).remove_columns("labels").add_column("labels", labels)


def test_the_weights_are_scikit_learns():
    labels = np.array([0] * 7 + [1] * 2 + [3])
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    for column in ("label", "labels"):
        found = balanced_weights(Dataset.from_dict({column: labels.tolist()}), 5)
        np.testing.assert_allclose(found[[0, 1, 3]], expected, rtol=1e-6)
        assert found[[2, 4]].tolist() == [0, 0]
    torch_rows = [{"labels": torch.tensor(label)} for label in labels]
    torch.testing.assert_close(balanced_weights(torch_rows, 5), found)


def lora(seed=0):
    torch.manual_seed(seed)
    model = get_lora_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"]))
    randomize_b(model, 0.1)
    return model


@pytest.mark.parametrize(("batch", "steps"), [(12, 1), (3, 4), (5, 3)])
def test_a_step_is_that_of_torchs_weighted_loss_on_the_whole_batch(tmp_path, batch, steps):
    data = uneven(2 * batch * steps)  # the step sees the first half: its weights' mean is not 1
    model = lora()
    reference = copy.deepcopy(model)
    fit = trainer(
        tmp_path, model, data, point_estimate=True, class_weights="balanced", per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps, max_steps=1, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant",
        max_grad_norm=0.0, train_sampling_strategy="sequential",
    )  # fmt: skip
    loss = fit.train().training_loss
    counts = np.bincount(data["labels"], minlength=3)
    weights = torch.tensor(len(data) / (3 * counts), dtype=torch.float32)
    data = data.select(range(batch * steps))
    assert weights[data["labels"]].mean() != pytest.approx(1, abs=1e-3)
    reference.eval()  # no dropout, as in training here
    logits = reference(input_ids=torch.tensor(data["input_ids"])).logits
    expected = nn.CrossEntropyLoss(weight=weights)(logits, torch.tensor(data["labels"]))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    moved = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(moved[name], parameter - 0.5 * parameter.grad, rtol=1e-4, atol=1e-6)


def test_evaluation_is_not_weighted(tmp_path):
    data = uneven()
    found = [trainer(tmp_path, blob_bert(), data, class_weights=one).evaluate() for one in (None, "balanced")]
    assert found[0]["eval_nll"] == found[1]["eval_nll"] == pytest.approx(found[0]["eval_loss"])


def test_mistakes(tmp_path):
    with pytest.raises(BlobError, match="class_weights must be balanced, got 'even'"):
        trainer(tmp_path, class_weights="even")
    with pytest.raises(BlobError, match="class_weights weighs the classes of a classifier; texts have none"):
        BlobSeq2SeqTrainingArguments(str(tmp_path), class_weights="balanced")
    with pytest.raises(BlobError, match="needs a class id as label"):
        trainer(tmp_path, data=rows().map(lambda row: {"labels": [1, 2]}), class_weights="balanced")
