import numpy as np
import pytest
import torch
from helpers.models import TARGETS, random_ids, randomize_b, tiny_bart, tiny_gpt2
from peft import LoraConfig
from scipy import stats
from transformers import TopKLogitsWarper

from blob_hf import BlobConfig, Sampling, get_blob_model
from blob_hf.experiments.arms import ARMS, SeededTokenSampling, summaries, uniforms
from blob_hf.tuner.build import get_lora_model


def blob(base=None, task="SEQ_2_SEQ_LM", targets="bart"):
    model = get_blob_model(
        base or tiny_bart(), BlobConfig(target_modules=TARGETS[targets], init_eps=0.9, task_type=task)
    )
    randomize_b(model)
    return model.eval()


def texts(model, arm, ids, dialogue="d", count=5, seed=3, **options):
    drawn = Sampling(count, seed, batch_size=options.pop("per_batch", None))
    return summaries(model, ids, arm, dialogue, drawn, max_new_tokens=8, **options).tolist()


def test_seeded_sampling_draws_from_the_distribution():
    """20,000 draws of one step against softmax, by a chi-square test (p > 0.001 fails once in 1,000 seeds)."""
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, 4] = float("-inf")
    count = 20_000
    processor = SeededTokenSampling(uniforms(0, "d", "a", range(count), 1), start=1)
    picked = processor(torch.zeros(count, 1, dtype=torch.long), logits.repeat(count, 1)).argmax(-1)
    seen, expected = np.bincount(picked, minlength=12), logits.softmax(-1)[0].numpy() * count
    assert seen[4] == 0
    keep = expected > 0
    assert stats.chisquare(seen[keep], expected[keep] * seen.sum() / expected[keep].sum()).pvalue > 0.001


@pytest.mark.parametrize("arm", [name for name, one in ARMS.items() if one.method == "blob"])
def test_a_text_depends_on_its_own_key_alone(arm):
    """Not on how many samples there are, which are made together, what was made before, or the global random state."""
    model, ids = blob(), random_ids(1, 9)
    together = texts(model, arm, ids)
    torch.rand(100)
    assert texts(model, arm, ids, per_batch=2) == together
    more = texts(model, arm, ids, count=7)
    width = min(len(more[0]), len(together[0]))
    assert [row[:width] for row in more[: len(together)]] == [row[:width] for row in together]
    if ARMS[arm].is_random:
        assert len({tuple(row) for row in together}) > 1
        assert texts(model, arm, ids, seed=4) != together
    if ARMS[arm].samples_tokens:
        assert texts(model, arm, ids, dialogue="another") != together


def test_the_arms_are_what_they_are_called():
    model, ids = blob(), random_ids(1, 9)
    mean = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert texts(model, "blob-mean-greedy", ids) == mean.tolist()
    samples = model.generate(input_ids=ids, sampling=Sampling(5, 3), max_new_tokens=8)
    assert texts(model, "blob-sample-greedy", ids) == samples.tolist()
    greedy = texts(model, "blob-mean-sampling", ids, top_k=1)  # of the likeliest token alone
    assert all(row == mean[0].tolist() for row in greedy)
    one = texts(model, "blob-sample-sampling", ids, top_k=1)
    assert one == samples.tolist()
    lora = get_lora_model(tiny_bart(), LoraConfig(target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM")).eval()
    assert texts(lora, "lora-greedy", ids) == lora.generate(input_ids=ids, max_new_tokens=8, do_sample=False).tolist()
    assert len({tuple(row) for row in texts(lora, "lora-sampling", ids)}) > 1


def test_token_sampling_of_a_decoder_only_model_follows_its_own_distribution():
    """The first token of many samples against top-k softmax of the last prompt position."""
    model = blob(tiny_gpt2(), "CAUSAL_LM", "gpt2")
    ids = random_ids(1, 6)
    count = 3000
    tokens = summaries(model, ids, "blob-mean-sampling", "d", Sampling(count), max_new_tokens=1, top_k=5)[:, -1]
    with torch.no_grad():
        probs = TopKLogitsWarper(5)(None, model(input_ids=ids).logits[:, -1]).softmax(-1)[0].numpy()
    seen = np.bincount(tokens, minlength=60)
    assert seen[probs == 0].sum() == 0
    keep = probs > 0
    expected = probs[keep].astype(float)
    assert stats.chisquare(seen[keep], expected / expected.sum() * count).pvalue > 0.001
