"""What a predictive knows of its task: against label rates by hand, and against the base model without its adapter."""

import math
from itertools import pairwise

import pytest
import torch
from helpers.models import TARGETS, random_ids, randomize_b, tiny_bert, tiny_gpt2
from helpers.training import rows, trainer

from blob_hf import BlobConfig, Sampling, get_blob_model
from blob_hf.inference.predict import predict_classes
from blob_hf.trainer.evaluation import information_gain, spread

SAMPLING = Sampling(4)


def classifier():
    torch.manual_seed(0)
    model = get_blob_model(tiny_bert(), BlobConfig(target_modules=TARGETS["bert"]))
    randomize_b(model)
    return model.eval()


def test_of_classes_it_is_what_the_predictive_beats_the_label_rates_by():
    model, labels = classifier(), torch.tensor([0, 0, 0, 1, 2, 0])
    batches = [{"input_ids": random_ids(3, 8), "labels": part} for part in labels.split(3)]
    found = information_gain(model, batches, lambda inputs: inputs.pop("labels"), SAMPLING)
    rates = {0: 4 / 6, 1: 1 / 6, 2: 1 / 6}
    reference = -sum(math.log(rates[int(label)]) for label in labels) / 6
    nll = 0.0
    for batch in batches:
        log_probs = predict_classes(model, {"input_ids": batch["input_ids"]}, SAMPLING).log_probs
        nll -= log_probs[range(3), batch["labels"]].sum().item() / 6
    assert found == pytest.approx(reference - nll, rel=1e-5)


def test_of_a_language_model_it_is_what_it_beats_its_base_by():
    torch.manual_seed(0)
    base = tiny_gpt2()
    ids = random_ids(4, 9)
    with torch.no_grad():
        logits = base(input_ids=ids).logits[:, :-1]
    before = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    model = get_blob_model(base, BlobConfig(target_modules=TARGETS["gpt2"], task_type="CAUSAL_LM")).eval()

    def aligned(inputs):
        labels = inputs.pop("labels")
        return torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()

    batches = [{"input_ids": ids, "labels": ids}]
    assert information_gain(model, batches, aligned, SAMPLING) == pytest.approx(0.0, abs=1e-6)  # B is 0
    randomize_b(model)
    gain = information_gain(model, batches, aligned, SAMPLING)
    with model.disable_adapter(), torch.no_grad():
        again = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ).item()
    assert again == pytest.approx(before) and gain != pytest.approx(0.0, abs=1e-3)


def test_without_rows_there_is_nothing_to_know():
    assert information_gain(classifier(), [], lambda inputs: inputs.pop("labels"), SAMPLING) is None
    torch.manual_seed(0)
    model = get_blob_model(tiny_gpt2(), BlobConfig(target_modules=TARGETS["gpt2"], task_type="CAUSAL_LM")).eval()
    no_targets = [{"input_ids": random_ids(2, 5), "labels": torch.full((2, 5), -100)}]
    assert information_gain(model, no_targets, lambda inputs: inputs.pop("labels"), SAMPLING) is None


@pytest.mark.parametrize("length", [5, 64, 100, 127, 191, 1000])
def test_the_rows_that_are_looked_at_reach_from_the_first_to_the_last(length):
    chosen = list(spread(list(range(length)), 64))
    gaps = [b - a for a, b in pairwise([*chosen, length])]
    assert chosen[0] == 0 and len(chosen) == min(64, length) and max(gaps) - min(gaps) <= 1


def test_a_posterior_at_the_prior_that_still_predicts_is_not_called_collapsed(tmp_path):
    """The case that the weights alone got wrong: nearly all of them at the prior, and the task learned all the same."""
    run = trainer(
        tmp_path,
        max_steps=120,
        learning_rate=0.1,
        kl_cycle_steps=None,
        kl_pull=1.6,
        kl_schedule="uniform",
        data=rows(48),
    )
    run.train()
    verdict = run.kl_verdict
    if verdict.figures.kl_per_weight >= 0.05:
        pytest.fail(f"the run no longer ends at the prior: {verdict}")
    assert verdict.figures.information_gain > 0.01 and verdict.name == "healthy", verdict
