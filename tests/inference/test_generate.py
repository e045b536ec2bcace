"""S networks in one batched `generate` against running each of them alone, merged into plain weights."""

import copy
import math

import pytest
import torch
from helpers.models import TARGETS, TINY, random_ids, randomize_b
from peft import LoraConfig
from transformers import GenerationConfig

from blob_hf import BlobConfig, get_blob_model
from blob_hf.inference.generate import PredictiveProcessor, generate_mean, generate_predictive, generate_samples
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

TASK = {"bart": "SEQ_2_SEQ_LM", "t5": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM"}
PAD = {"bart": 1, "t5": 0, "gpt2": 0}


def make(family, init_eps=0.9):
    config = BlobConfig(target_modules=TARGETS[family], init_eps=init_eps, task_type=TASK[family])
    model = get_blob_model(TINY[family](), config)
    randomize_b(model)
    return model.eval()


def ragged(family, rows=4):
    """Inputs of different lengths: a decoder is padded on the left."""
    inputs = {"input_ids": random_ids(rows, 9), "attention_mask": torch.ones(rows, 9, dtype=torch.long)}
    for row, kept in ((1, 7), (2, 4)):
        padding = slice(0, 9 - kept) if family == "gpt2" else slice(kept, 9)
        inputs["input_ids"][row, padding] = PAD[family]
        inputs["attention_mask"][row, padding] = 0
    return inputs


def merged(model, seed, index):
    """Sample `index` as an ordinary transformers model, with its weights merged."""
    return copy.deepcopy(model).merge_posterior_sample(seed, index).eval()


DECODING = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 4, "do_sample": False},
    "penalties": {"num_beams": 2, "length_penalty": 2.0, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
}


@pytest.mark.parametrize("family", TASK)
@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("per_batch", [None, 2])
def test_a_sample_is_one_network_merged_and_run_alone(family, decoding, per_batch):
    model, inputs = make(family), ragged(family)
    options = {"max_new_tokens": 12, "pad_token_id": PAD[family], **DECODING[decoding]}
    # an end token that comes early in some rows
    options["eos_token_id"] = [2, *range(20, 26)]
    together = model.generate(**inputs, sampling=Sampling(3, 4, batch_size=per_batch), **options)
    assert together.shape[0] == 4 * 3
    texts = set()
    for s in range(3):
        alone = merged(model, 4, s).generate(**inputs, **options)
        mine = together[s::3]  # rows: all samples of input 0 first
        assert torch.equal(mine[:, : alone.shape[1]], alone)
        assert (mine[:, alone.shape[1] :] == PAD[family]).all()
        texts.add(tuple(alone.flatten().tolist()))
    assert len(texts) == 3


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("per_batch", [None, 2])
def test_scores_come_in_the_order_of_the_texts(decoding, per_batch):
    """`compute_transition_scores` of transformers reads them as it reads those of one network."""
    model, inputs = make("bart"), ragged("bart")
    options = {"max_new_tokens": 8, "eos_token_id": [2, *range(20, 26)], **DECODING[decoding]}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    together = model.generate(**inputs, sampling=Sampling(3, batch_size=per_batch), **options)
    base = model.get_base_model()

    def transitions(output):
        normalize = "num_beams" not in options
        return base.compute_transition_scores(
            output.sequences, output.scores, output.get("beam_indices"), normalize_logits=normalize
        )

    for s in range(3):
        alone = merged(model, 0, s).generate(**inputs, **options)
        kept = alone.sequences.shape[1]
        expected = transitions(alone)
        # the scores of a pad token behind the end of a text mean nothing
        real = alone.sequences[:, 1:][:, -expected.shape[1] :] != PAD["bart"]
        found = transitions(together)[s::3, : expected.shape[1]]
        assert torch.equal(together.sequences[s::3, :kept], alone.sequences)
        torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-4)
        if alone.get("sequences_scores") is not None:
            torch.testing.assert_close(together.sequences_scores[s::3], alone.sequences_scores, rtol=1e-3, atol=1e-4)


def test_token_sampling_draws_several_texts_of_each_network():
    model, inputs = make("bart"), ragged("bart")
    torch.manual_seed(3)
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6}
    tokens = model.generate(**inputs, sampling=Sampling(3, batch_size=1), **options)
    assert tokens.shape[0] == 4 * 3 * 2
    torch.manual_seed(3)
    alone = model.generate(**inputs, sampling=1, **options)  # the first sample, with the same draws
    rows = tokens.view(4, 3, 2, -1)[:, 0].flatten(0, 1)
    assert torch.equal(rows[:, : alone.shape[1]], alone)


def test_a_sample_is_one_network_through_all_decoding_steps():
    """With a KV cache a step sees one token; without it, everything is computed anew by the same weights."""
    model, inputs = make("bart"), {"input_ids": random_ids(2, 9)}
    decoding = {"max_new_tokens": 12, "do_sample": False}
    cached = generate_samples(model, inputs, 2, use_cache=True, **decoding)
    anew = generate_samples(model, inputs, 2, use_cache=False, **decoding)
    assert cached.shape[:2] == (2, 2) and torch.equal(cached, anew)


@pytest.mark.parametrize("family", TASK)
def test_without_samples_and_with_no_std_it_is_plain_generate(family):
    model, inputs = make(family, init_eps=1e-6), ragged(family)
    for decoding in DECODING.values():
        options = {"max_new_tokens": 8, "pad_token_id": PAD[family], **decoding}
        plain = model.generate(**inputs, **options)
        mask = {"attention_mask": inputs["attention_mask"]}
        assert torch.equal(model.generate(inputs["input_ids"], sampling=1, **mask, **options), plain)
        assert torch.equal(generate_predictive(model, inputs, 1, **options).sequences, plain)


def test_mean_is_generated_by_the_posterior_mean_even_in_train_mode():
    model, inputs = make("bart"), {"input_ids": random_ids(2, 9)}
    expected = model.generate(**inputs, max_new_tokens=8)
    for layer in gaussian_layers(model).values():
        layer.train()
    assert torch.equal(generate_mean(model, inputs, max_new_tokens=8), expected)


# ----- the posterior predictive ----------------------------------------------------------------------------------


def next_log_probs(networks, family, inputs, prefix):
    """log mean_s p(. | prefix) of separate networks, and the entropies (total, aleatoric), for one row each."""
    probs = []
    for network in networks:
        if family == "gpt2":
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(prefix)], dim=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            ids = torch.cat([inputs["input_ids"], prefix], dim=1)
            logits = network(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        else:
            start = torch.full((len(prefix), 1), network.config.decoder_start_token_id)
            logits = network(**inputs, decoder_input_ids=torch.cat([start, prefix], dim=1)).logits
        probs.append(logits[:, -1].double().softmax(-1))
    mean = torch.stack(probs).mean(0)
    entropy = lambda p: -(p * p.log()).sum(-1)  # noqa: E731
    return mean.log(), entropy(mean), torch.stack([entropy(p) for p in probs]).mean(0)


@pytest.mark.parametrize("family", TASK)
def test_greedy_predictive_decoding_is_a_loop_over_merged_networks(family):
    model, inputs = make(family), ragged(family)
    networks = [merged(model, 5, s) for s in range(3)]
    options = {"max_new_tokens": 7, "pad_token_id": PAD[family]}
    model.generation_config.eos_token_id = None
    drawn = Sampling(3, seed=5)
    end = generate_predictive(model, inputs, drawn, **options).tokens[0, 2].item()  # so that one text ends early
    found = generate_predictive(model, inputs, drawn, eos_token_id=end, **options)
    prefix = torch.empty(4, 0, dtype=torch.long)
    ended = torch.zeros(4, dtype=torch.bool)
    for t in range(found.tokens.shape[1]):
        with torch.no_grad():
            log_probs, total, aleatoric = next_log_probs(networks, family, inputs, prefix)
        token = log_probs.argmax(-1)
        live = ~ended
        assert torch.equal(found.tokens[live, t], token[live]) and (found.tokens[ended, t] == -100).all()
        u = found.uncertainty
        for value, expected in (
            (u.log_probs, log_probs.amax(-1)), (u.total, total), (u.aleatoric, aleatoric),
            (u.epistemic, total - aleatoric),
        ):  # fmt: skip
            torch.testing.assert_close(value[live, t].double(), expected[live], rtol=1e-3, atol=1e-4)
            assert (value[ended, t] == 0).all()
        ended |= token == end
        prefix = torch.cat([prefix, token.unsqueeze(1)], dim=1)
    assert found.uncertainty.epistemic.max() > 1e-3 and ended.any()


@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_predictive_beam_search_is_a_beam_search_over_merged_networks(family):
    """Texts of a fixed length, so that a beam search is no more than: extend, keep the best."""
    model, inputs = make(family), {name: value[:1] for name, value in ragged(family).items()}
    networks = [merged(model, 6, s) for s in range(3)]
    beams, steps = 3, 4
    hypotheses = [(0.0, [])]
    for _ in range(steps):
        extended = []
        for score, tokens in hypotheses:
            with torch.no_grad():
                prefix = torch.tensor([tokens], dtype=torch.long).view(1, -1)
                log_probs, _, _ = next_log_probs(networks, family, inputs, prefix)
            extended += [(score + value, [*tokens, token]) for token, value in enumerate(log_probs[0].tolist())]
        hypotheses = sorted(extended, reverse=True)[:beams]
    model.generation_config.eos_token_id = None
    found = generate_predictive(
        model,
        inputs,
        Sampling(3, seed=6),
        num_beams=beams,
        max_new_tokens=steps,
        pad_token_id=PAD[family],
        do_sample=False,
    )
    assert found.tokens[0].tolist() == hypotheses[0][1]
    assert found.uncertainty.log_probs.sum().item() == pytest.approx(hypotheses[0][0], rel=1e-4)


# ----- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["penalty_alpha", "assistant_model", "prompt_lookup_num_tokens", "output_attentions"])
def test_what_needs_one_network_is_refused(name):
    model, inputs = make("bart"), ragged("bart")
    with pytest.raises(BlobError, match=f"is not supported together with posterior samples; leave out {name}"):
        model.generate(**inputs, sampling=2, **{name: 1})
    config = GenerationConfig()
    setattr(config, name, 1)
    with pytest.raises(BlobError, match="not supported"):
        generate_predictive(model, inputs, 2, generation_config=config)


def test_bad_numbers_of_samples():
    model, inputs = make("bart"), ragged("bart")
    for count, least in ((0, 1), (-1, 0)):
        with pytest.raises(BlobError, match=f"must be >= {least}, got {count}"):
            model.generate(**inputs, sampling=count)
        with pytest.raises(BlobError, match=f"must be >= {least}, got {count}"):
            generate_predictive(model, inputs, count)
    with pytest.raises(BlobError, match="leave out do_sample"):
        generate_predictive(model, inputs, 2, do_sample=True)
    with pytest.raises(BlobError, match="needs input_ids"):
        model.generate(sampling=2)
    lora = get_lora_model(TINY["bart"](), LoraConfig(target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(BlobError, match="no posterior to sample from"):
        lora.generate(**inputs, sampling=2)


@pytest.mark.parametrize("normalized", [True, False])
def test_entropies_of_a_two_token_case_by_hand(normalized):
    """Two networks that say (0.9, 0.1) and (0.3, 0.7): the predictive is (0.6, 0.4). A third token is impossible."""
    processor = PredictiveProcessor(2, normalized, candidates=2)
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.3, 0.7, 0.0]]).log()
    predictive = processor(None, scores if normalized else scores + torch.tensor([[5.0], [-3.0]]))
    for row in predictive:
        assert row.exp().tolist() == pytest.approx([0.6, 0.4, 0.0])
    found = processor.uncertainty(torch.tensor([[1]]), torch.tensor([[0]]))

    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    assert found.log_probs.item() == pytest.approx(math.log(0.4), rel=1e-5)
    assert found.total.item() == pytest.approx(entropy(0.4), rel=1e-5)
    assert found.aleatoric.item() == pytest.approx((entropy(0.1) + entropy(0.3)) / 2, rel=1e-5)
    assert found.epistemic.item() == pytest.approx(entropy(0.4) - (entropy(0.1) + entropy(0.3)) / 2, rel=1e-4)


def test_probabilities_that_underflow_keep_their_order():
    processor = PredictiveProcessor(2, normalized=True)
    scores = torch.tensor([[-0.0, -200.0, -300.0], [-0.0, -210.0, -310.0]])
    assert processor(None, scores)[0].tolist() == pytest.approx([0.0, -200 - math.log(2), -300 - math.log(2)], abs=1e-3)
