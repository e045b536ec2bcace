"""Small models with a saved base and an adapter on them, for the tests of files."""

import pytest
import torch

from blob_hf import BlobConfig, get_blob_model
from blob_hf.utils.errors import BlobError
from helpers.models import TARGETS, TINY, random_ids, randomize_b

TASK = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "bart": "SEQ_2_SEQ_LM", "t5": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM"}


def saved_base(family, folder, **changes):
    base = TINY[family](**changes)
    base.save_pretrained(folder)
    return type(base).from_pretrained(folder).eval()


def inputs_for(family, rows=3):
    inputs = {"input_ids": random_ids(rows, 8)}
    if family in ("bart", "t5"):
        inputs["decoder_input_ids"] = random_ids(rows, 5)
    return inputs


def trained(family, folder, r=4, **config):
    model = get_blob_model(
        saved_base(family, folder), BlobConfig(target_modules=TARGETS[family], task_type=TASK[family], r=r, **config)
    )
    randomize_b(model)
    return model.eval()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def blob(base, **config):
    config = {"target_modules": ["query", "value"], "r": 4, "init_eps": 0.9, **config}
    model = get_blob_model(base, BlobConfig(**config))
    randomize_b(model)
    return model.eval()


def assert_same(one, other, inputs):
    """The same mean and the same samples, to the last bit."""
    assert torch.equal(logits(one, inputs), logits(other, inputs))
    with one.posterior_samples(1, seed=3), other.posterior_samples(1, seed=3):
        assert torch.equal(logits(one, inputs), logits(other, inputs))


def one_line(match, call):
    with pytest.raises(BlobError, match=match) as error:
        call()
    assert "\n" not in str(error.value)
