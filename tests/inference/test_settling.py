"""As many samples as needed: against all of them, whatever the batch is."""

import numpy as np
import pytest
import torch
from helpers.models import TARGETS, random_ids, randomize_b, tiny_bart, tiny_bert, tiny_tokenizer, words
from scipy.special import expit, log_softmax

from blob_hf import BlobConfig, Sampling, get_blob_model
from blob_hf.inference.predict import predict_classes
from blob_hf.inference.settling import rounds, settle, standard_error
from blob_hf.utils.errors import BlobError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = get_blob_model(tiny_bert(), BlobConfig(target_modules=TARGETS["bert"], init_eps=0.7))
    randomize_b(model, 0.3)
    return model.eval()


def test_a_round_ends_at_a_divisor_after_whole_pairs():
    def ends(total, **options):
        parts = list(rounds(Sampling(total, tolerance=0.1, **options)))
        assert [part.first for part in parts[1:]] == [part.indices.stop for part in parts[:-1]]
        return [part.indices.stop for part in parts]

    assert ends(16) == [2, 4, 8, 16] and ends(24) == [2, 4, 6, 8, 12, 24] and ends(10) == [2, 10] and ends(7) == [7]
    assert ends(8, first=3) == [5, 7, 11]


def noisy(count, spread, seed=0):
    """Log-probabilities of 40 samples for each input, whose spread differs."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, 1, 3)) + spread[:, None, None] * rng.normal(size=(count, 40, 3))
    return log_softmax(logits, axis=-1)


def test_inputs_leave_when_they_have_settled_and_averages_are_those_of_what_was_drawn():
    spread = np.array([0.0, 0.01, 0.3, 3.0])
    every = noisy(4, spread)
    asked = []

    def draw(indices, part):
        asked.append((tuple(indices), part.num_samples))
        return every[list(indices), part.first : part.first + part.num_samples]

    found = settle(4, Sampling(16, tolerance=0.1), draw)
    assert asked[0] == ((0, 1, 2, 3), 2) and found.networks[0] == found.networks[1] == 2 and found.networks[3] == 16
    assert list(found.networks) == sorted(found.networks) and found.log_probs.shape == (4, 16, 3)
    for index, count in enumerate(found.networks):
        drawn = np.exp(every[index, :count])
        np.testing.assert_allclose(np.exp(found.log_probs[index]).mean(0), drawn.mean(0), atol=1e-12)
        np.testing.assert_allclose(np.exp(found.log_probs[index]).std(0), drawn.std(0), atol=1e-12)
    tight = settle(4, Sampling(16, tolerance=1e-300), draw)
    assert list(tight.networks) == [16] * 4
    np.testing.assert_array_equal(tight.log_probs, every[:, :16])


@pytest.mark.parametrize("pairs", [False, True])
def test_the_standard_error_is_an_upper_bound_of_that_of_the_average(pairs):
    """Log-odds c + s eps: against the spread of 4,000 averages, which nineteen in twenty estimates are not below."""
    rng = np.random.default_rng(0)
    for centre, spread, count in ((0.5, 0.02, 2), (2.0, 1.0, 4), (3.0, 4.0, 2), (0.0, 1.0, 8), (4.0, 2.0, 12)):
        noise = rng.normal(size=(4000, count))
        if pairs:
            noise[:, 1::2] = -noise[:, 0::2]
        ones = expit(centre + spread * noise)
        truth = ones.mean(1).std()
        found = standard_error(np.stack([ones, 1 - ones], axis=2), pairs)
        np.testing.assert_allclose(found[:, 0], found[:, 1], rtol=1e-4, atol=1e-9)
        assert (found[:, 0] >= truth).mean() > 0.85, (centre, spread, count)
        if count >= 8:
            assert np.median(found) < 4 * truth + 1e-3, (centre, spread, count)  # and not by far


def test_networks_that_are_sure_by_chance_do_not_settle_an_input():
    """Two networks that give 0.99 and 0.999: their probabilities agree, their log-odds do not."""
    sure = np.array([[0.99, 0.999], [0.99, 0.9901]])
    found = standard_error(np.stack([sure, 1 - sure], axis=2), True).max(1)
    assert found[0] > 0.1 > 0.001 > found[1]


@pytest.mark.parametrize("draw", ["iid", "antithetic", "qmc"])
def test_with_a_tolerance_of_next_to_nothing_it_is_all_samples(model, draw):
    texts, tokenizer = words(12), tiny_tokenizer()
    whole = model.predict(texts, tokenizer, Sampling(8, 3, draw))
    found = model.predict(texts, tokenizer, Sampling(8, 3, draw, tolerance=1e-12))
    assert whole.networks is None and list(found.networks) == [8] * 12
    np.testing.assert_allclose(found.sample_probabilities, whole.sample_probabilities, atol=1e-6)
    np.testing.assert_allclose(found.epistemic, whole.epistemic, atol=1e-6)
    assert "networks" not in whole.records()[0] and found.records()[0]["networks"] == 8


def test_what_an_input_is_given_does_not_depend_on_its_batch(model):
    texts, tokenizer = words(24), tiny_tokenizer()
    sampling = Sampling.auto(0.05, 32, seed=5)
    found = model.predict(texts, tokenizer, sampling, batch_size=32)
    assert len(set(found.networks)) > 1 and set(found.networks) <= {2, 4, 8, 16, 32}
    order = np.random.default_rng(0).permutation(24)
    for other, back in (
        (model.predict(texts, tokenizer, sampling, batch_size=1), np.arange(24)),
        (model.predict(texts, tokenizer, sampling, batch_size=5), np.arange(24)),
        (model.predict([texts[i] for i in order], tokenizer, sampling, batch_size=7), np.argsort(order)),
    ):
        np.testing.assert_array_equal(other.networks[back], found.networks)
        np.testing.assert_allclose(other.probabilities[back], found.probabilities, atol=1e-5)
    whole = model.predict(texts, tokenizer, Sampling(32, 5, "antithetic"))
    assert np.abs(found.probabilities - whole.probabilities).max() < 4 * 0.05  # four standard errors
    assert np.array_equal(found.label_ids[found.confidence > 0.6], whole.label_ids[found.confidence > 0.6])


def test_of_a_batch_and_with_a_shared_trunk(model):
    inputs = {"input_ids": random_ids(9, 7)}
    for layers in (None, 1):
        sampling = Sampling.auto(0.03, 16, seed=1, layers=layers)
        found = predict_classes(model, inputs, sampling)
        whole = predict_classes(model, inputs, Sampling(16, 1, "antithetic", layers=layers))
        assert found.networks is not None and found.sample_log_probs.shape == whole.sample_log_probs.shape
        for row, count in enumerate(found.networks.tolist()):
            expected = whole.sample_log_probs[row, :count].exp().mean(0)
            torch.testing.assert_close(found.log_probs[row].exp(), expected, atol=1e-5, rtol=1e-5)


def test_the_word_auto_is_for_classes_alone():
    texts = ["w4 w5"]
    torch.manual_seed(0)
    writer = get_blob_model(tiny_bart(), BlobConfig(target_modules=TARGETS["bart"], task_type="SEQ_2_SEQ_LM")).eval()
    for call in (
        lambda: writer.predict(texts, tiny_tokenizer(), "auto"),
        lambda: writer.generate(input_ids=random_ids(1, 4), sampling="auto"),
    ):
        with pytest.raises(BlobError, match="is for classes and choices: a text has no .* give a number") as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(BlobError, match=r"num_samples must be a number, got 'auto'; Sampling.auto\(\)"):
        Sampling("auto")
    assert Sampling.of("auto").tolerance == Sampling.auto().tolerance


def test_rounds_that_begin_inside_a_pair_count_no_pairs():
    """From an odd sample on a round of two has the ends of two pairs: what is odd does not cancel in it."""
    odds = np.random.default_rng(0).normal(size=(200, 26))

    def draw(rows, part):
        chosen = expit(odds[list(rows), part.first : part.first + part.num_samples])
        return np.log(np.stack([chosen, 1 - chosen], axis=-1))

    odd, even = (settle(200, Sampling.auto(first=first), draw) for first in (1, 2))
    assert odd.networks.mean() > 1.5 * even.networks.mean()
    average = np.exp(odd.log_probs)[..., 0].mean(axis=1)
    assert np.sqrt(((average - 0.5) ** 2).mean()) < 0.1  # the tolerance, which is an upper bound
