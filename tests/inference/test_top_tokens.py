"""The likeliest tokens at each place, and samples that draw their tokens, against plain networks."""

import pytest
import torch
from helpers.chat import ENDS, causal, networks
from helpers.models import tiny_tokenizer, words

from blob_hf import Sampling
from blob_hf.utils.errors import BlobError

LENGTH, SAMPLES, SEED = 6, 3, 5


@torch.no_grad()
def averaged(models, ids):
    """The averaged probabilities of the next token."""
    return torch.stack([model(torch.tensor([ids])).logits[0, -1].double().softmax(-1) for model in models]).mean(0)


@pytest.mark.parametrize("decoding", ["predictive", "mbr"])
def test_top_tokens_are_those_of_the_averaged_networks(decoding):
    model, tokenizer, texts = causal("llama"), tiny_tokenizer(), words(2, seed=3)
    own = {"max_new_tokens": LENGTH, "decoding": decoding, "top_tokens": 4}
    found = model.predict(texts, tokenizer, Sampling(SAMPLES, seed=SEED), **own)
    plain = networks(model, SAMPLES, SEED)
    for row, text in enumerate(texts):
        ids = tokenizer(text).input_ids
        kept = [int(token) for token in found.tokens[row] if token != -100]
        for at, token in enumerate(kept):
            expected = averaged(plain, [*ids, *kept[:at]]).topk(4)
            assert found.top_tokens.tokens[row, at].tolist() == expected.indices.tolist()
            torch.testing.assert_close(
                found.top_tokens.log_probs[row, at].double(), expected.values.log(), rtol=1e-4, atol=1e-4
            )
            assert decoding == "mbr" or token == expected.indices[0]
    without = model.predict(texts, tokenizer, Sampling(SAMPLES, seed=SEED), max_new_tokens=LENGTH, decoding=decoding)
    assert without.top_tokens is None and without.texts == found.texts
    assert torch.equal(without.token_uncertainty.log_probs, found.token_uncertainty.log_probs)


def test_a_sample_at_a_temperature_is_that_of_its_network():
    model, tokenizer, text = causal("llama"), tiny_tokenizer(), words(1, seed=3)[0]
    state = torch.get_rng_state()
    found = model.predict([text], tokenizer, Sampling(1, seed=SEED), max_new_tokens=LENGTH, temperature=0.7)
    assert torch.equal(torch.get_rng_state(), state)
    (plain,) = networks(model, 1, SEED)
    ids = tokenizer(text, return_tensors="pt").input_ids
    torch.manual_seed(SEED)
    with torch.no_grad():
        out = plain.generate(
            ids, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=LENGTH, eos_token_id=ENDS, pad_token_id=0
        )
        new = out[0, ids.shape[1] :]
        scores = plain(out).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    assert found.samples[0][0] == tokenizer.decode(new, skip_special_tokens=True)
    assert float(found.sample_log_probs[0, 0]) == pytest.approx(float(scores.gather(1, new[:, None]).sum()), rel=1e-4)


def test_the_temperature_changes_the_samples_and_not_the_predictive():
    model, tokenizer, texts = causal("llama"), tiny_tokenizer(), words(2, seed=3)
    cold, warm, again = (
        model.predict(texts, tokenizer, Sampling(SAMPLES, seed=SEED), max_new_tokens=LENGTH, temperature=value)
        for value in (0.0, 1.5, 1.5)
    )
    assert warm.samples == again.samples != cold.samples
    assert warm.texts == cold.texts
    with pytest.raises(BlobError, match="temperature and top_tokens must be >= 0, got -1"):
        model.predict(texts, tokenizer, 2, max_new_tokens=4, temperature=-1.0)
