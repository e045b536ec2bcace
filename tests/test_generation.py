"""S networks in one batched `generate` against running each of them alone."""

import pytest
import torch
from conftest import TARGETS, TINY, random_ids, randomize_b

from blob_hf import BlobConfig, get_blob_model
from blob_hf.generation import generate_mean, generate_samples


def make(family):
    config = BlobConfig(target_modules=TARGETS[family], init_eps=0.9, task_type="SEQ_2_SEQ_LM")
    model = get_blob_model(TINY[family](), config)
    randomize_b(model)
    return model.eval()


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("per_batch", [None, 2])
def test_batched_samples_are_those_of_each_network_alone(family, num_beams, per_batch):
    model = make(family)
    inputs = {"input_ids": random_ids(4, 9), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    inputs["attention_mask"][2, 6:] = 0
    decoding = {"max_new_tokens": 12, "num_beams": num_beams, "do_sample": False}
    together = generate_samples(model, inputs, 3, seed=4, samples_per_batch=per_batch, pad_token_id=1, **decoding)
    assert together.shape[:2] == (4, 3)
    different = set()
    for s in range(3):
        with model.posterior_samples(1, seed=4, first=s):
            alone = model.generate(**inputs, **decoding)
        assert torch.equal(together[:, s, : alone.shape[1]], alone)
        assert (together[:, s, alone.shape[1] :] == 1).all()
        different.add(tuple(alone[:, :3].flatten().tolist()))
    assert len(different) == 3


def test_a_sample_is_one_network_through_all_decoding_steps():
    """With a KV cache a step sees one token; without it, everything is computed anew by the same weights."""
    model, inputs = make("bart"), {"input_ids": random_ids(2, 9)}
    decoding = {"max_new_tokens": 12, "do_sample": False}
    cached = generate_samples(model, inputs, 2, use_cache=True, **decoding)
    anew = generate_samples(model, inputs, 2, use_cache=False, **decoding)
    assert torch.equal(cached, anew)


def test_mean_is_generated_by_the_posterior_mean_even_in_train_mode():
    model, inputs = make("bart"), {"input_ids": random_ids(2, 9)}
    expected = model.generate(**inputs, max_new_tokens=8)
    for module in model.modules():
        if type(module).__name__ == "GaussianA":
            module.train()
    assert torch.equal(generate_mean(model, inputs, max_new_tokens=8), expected)
