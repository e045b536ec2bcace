"""A trunk that samples share, against the loop over samples in which the layers below are at the mean."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from helpers.models import TARGETS, TINY, random_ids, randomize_b
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from blob_hf import BlobConfig, Sampling, generate_predictive, get_blob_model
from blob_hf.inference.predict import predict_classes, repeat_rows, score_targets
from blob_hf.tuner.in_flight import Frozen, fixed
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.tuner.stacks import layer_stacks
from blob_hf.utils.errors import BlobError


def tiny_llama(kind=LlamaForCausalLM, **more):
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=64, pad_token_id=0, eos_token_id=2, **more,
    )  # fmt: skip
    return kind(config).eval()


MAKE = {
    **TINY,
    "llama": tiny_llama,
    "llama classifier": lambda: tiny_llama(LlamaForSequenceClassification, num_labels=3),
}
ADAPTED = {**TARGETS, "llama": ["q_proj", "v_proj", "lm_head"], "llama classifier": ["q_proj", "v_proj", "score"]}
# by layer name: the layer's number, counted over encoder and decoder; a head's is behind all
LAYERS = {"bert": 2, "roberta": 2, "bart": 4, "t5": 4, "gpt2": 2, "llama": 3, "llama classifier": 3}


def blob(family, **config):
    torch.manual_seed(0)
    model = get_blob_model(MAKE[family](), BlobConfig(target_modules=ADAPTED[family], init_eps=0.9, r=4, **config))
    randomize_b(model)
    return model.eval().requires_grad_(False)


def number(family, name):
    """Of the layer that a module is in, read off its name: an independent truth."""
    parts = name.split(".")
    own = next((int(part) for part in parts if part.isdigit()), None)
    if own is None or not {"layer", "layers", "block", "h"} & set(parts):
        return LAYERS[family]
    return own + (LAYERS[family] // 2 if "decoder" in parts else 0)


def inputs_for(family, rows=3, padded=True):
    ids = random_ids(rows, 7)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :2] = 0  # on the left, as decoders want it
        ids[1, :2] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    return found | ({"decoder_input_ids": random_ids(rows, 5)} if family in ("bart", "t5") else {})


@contextmanager
def one_sample(model, family, sampling, index, last):
    """Sample `index` of the layers from number L - last on, the mean below: brute force, without any trunk."""
    layers = gaussian_layers(model)
    one = Sampling(1, sampling.seed, sampling.draw, first=index)
    kept = {name: number(family, name) >= LAYERS[family] - last for name in layers}
    with fixed({layer: layer.freeze(one) if kept[name] else Frozen(None) for name, layer in layers.items()}):
        yield


@contextmanager
def rows_of_layers(model):
    """How many rows each layer runs on, by its place in the order."""
    seen = []
    blocks = [block for stack in layer_stacks(model) for block in stack]

    def remember(index):
        return lambda module, args, kwargs, output: seen.append(
            (index, len(output[0] if isinstance(output, tuple) else output))
        )

    first = [
        next(module for module in block.modules() if type(module).__name__.endswith("Attention")) for block in blocks
    ]
    hooks = [module.register_forward_hook(remember(i), with_kwargs=True) for i, module in enumerate(first)]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", LAYERS)
def test_a_shared_trunk_is_the_loop_with_the_mean_below(family):
    model, inputs, samples = blob(family), inputs_for(family), 4
    for last in range(1, LAYERS[family] + 1):
        sampling = Sampling(samples, 3, layers=last)
        expected = []
        for s in range(samples):
            with one_sample(model, family, sampling, s, last):
                expected.append(model(**inputs).logits)
        with rows_of_layers(model) as rows, model.posterior_samples(sampling):
            found = model(**repeat_rows(inputs, samples)).logits
        torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-4)
        assert not torch.allclose(found[:3], found[3:6], atol=1e-3)  # samples differ
        assert [layer for layer, _ in rows] == list(range(LAYERS[family]))
        for layer, count in rows:
            assert count == (3 if layer < LAYERS[family] - last else 12), (layer, last)
        with model.posterior_samples(sampling, repeat=True):
            torch.testing.assert_close(model(**inputs).logits, found, atol=0, rtol=0)
    if last == LAYERS[family]:
        with model.posterior_samples(Sampling(samples, 3)):
            torch.testing.assert_close(model(**repeat_rows(inputs, samples)).logits, found, atol=2e-5, rtol=1e-4)


WRITERS = {"llama": 2, "gpt2": 1, "bart": 1, "t5": 3}  # and how many last layers are sampled: with an encoder inside


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", WRITERS)
def test_predictive_decoding_with_a_cache_shares_the_trunk_at_every_step(family, beams):
    """Against decoding with all rows everywhere: the same model with hooks that never share."""
    model, last, inputs = blob(family), WRITERS[family], inputs_for(family)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "num_beams": beams, "pad_token_id": 0}
    sampling = Sampling(4, 1, layers=last)
    with rows_of_layers(model) as rows:
        found = generate_predictive(model, inputs, sampling, **options)
    lower = {count for layer, count in rows if layer < LAYERS[family] - last}
    inside = last > LAYERS[family] / 2 and family in ("bart", "t5")  # the layers below are an encoder's, without beams
    assert max(lower) == (3 if inside else 3 * beams) and max(count for _, count in rows) == 12 * beams
    with unshared(model, last, sampling):
        expected = generate_predictive(model, inputs, Sampling(4, 1), **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.uncertainty.log_probs, expected.uncertainty.log_probs, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.uncertainty.epistemic, expected.uncertainty.epistemic, atol=2e-5, rtol=1e-3)


@contextmanager
def unshared(model, last, sampling):
    """Layers below the last ones draw the mean for every sample: no trunk is told of it."""
    family = next(one for one in WRITERS if one in type(model.get_base_model()).__name__.lower())
    layers = [layer for name, layer in gaussian_layers(model).items() if number(family, name) < LAYERS[family] - last]
    stds = [layer.rho.clone() for layer in layers]
    for layer in layers:
        layer.rho.zero_()
    yield
    for layer, rho in zip(layers, stds, strict=True):
        layer.rho.copy_(rho)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", WRITERS)
def test_samples_that_write_texts_of_their_own_share_what_they_can(family, beams):
    """Blocks are the same until their texts part; each text is that of its network alone."""
    model, last, inputs = blob(family), WRITERS[family], inputs_for(family)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "num_beams": beams, "pad_token_id": 0, "do_sample": False}
    with rows_of_layers(model) as rows:
        found = model.generate(**inputs, sampling=Sampling(4, 1, layers=last), **options).unflatten(0, (3, 4))
    assert rows[0] == (0, 3 * (1 if family in ("bart", "t5") else beams)) and len(found.unique(dim=1)[0]) > 1
    for s in range(4):
        with one_sample(model, family, Sampling(4, 1), s, last):
            alone = model.generate(**inputs, **options)
        width = min(alone.shape[1], found.shape[2])
        assert torch.equal(found[:, s, :width], alone[:, :width])


def test_scores_and_classes_are_those_of_the_loop():
    for family in ("bart", "llama"):
        model, inputs, labels = blob(family), inputs_for(family), random_ids(3, 5)
        labels = labels if family == "bart" else random_ids(3, 7)
        found = score_targets(model, inputs, labels, Sampling(5, 2, layers=1))
        for s in range(5):
            with one_sample(model, family, Sampling(5, 2), s, 1):
                own = model(**inputs).logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(found.sample_log_probs[:, s], own.sum(1), atol=1e-4, rtol=1e-4)
    model, inputs = blob("bert"), inputs_for("bert")
    whole = predict_classes(model, inputs, Sampling(5, 2, layers=1))
    parts = predict_classes(model, inputs, Sampling(5, 2, layers=1, batch_size=2))
    torch.testing.assert_close(whole.sample_log_probs, parts.sample_log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.mean_log_probs, model(**inputs).logits.log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_rows_that_are_not_the_same_are_not_taken_for_one():
    """Blocks of other inputs are each sample's own, though the layers below are shared where they can be."""
    model, sampling = blob("bert"), Sampling(2, 0, layers=1)
    ids = random_ids(4, 7)
    with model.posterior_samples(sampling):
        found = model(input_ids=ids).logits
    for s in range(2):
        with one_sample(model, "bert", sampling, s, 1):
            torch.testing.assert_close(found.view(2, 2, -1)[s], model(input_ids=ids[2 * s : 2 * s + 2]).logits)


def test_the_innermost_block_decides_and_nothing_is_left_behind():
    model, inputs = blob("bert"), inputs_for("bert")
    mean = model(**inputs).logits
    with model.posterior_samples(Sampling(3, 1)):
        everywhere = model(**repeat_rows(inputs, 3)).logits
    with model.posterior_samples(Sampling(3, 1, layers=1)):
        shared = model(**repeat_rows(inputs, 3)).logits
        with model.posterior_mean():
            assert torch.equal(model(**inputs).logits, mean)
        with model.posterior_samples(Sampling(3, 1)):
            torch.testing.assert_close(model(**repeat_rows(inputs, 3)).logits, everywhere)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).logits, mean)
        assert torch.equal(model(**repeat_rows(inputs, 3)).logits, shared)
    assert torch.equal(model(**inputs).logits, mean)
    with twin.posterior_samples(Sampling(3, 1, layers=1)):
        torch.testing.assert_close(twin(**repeat_rows(inputs, 3)).logits, shared)


def test_threads_share_trunks_of_their_own():
    model, inputs = blob("bert"), inputs_for("bert")
    start = threading.Barrier(6)

    def answer(worker, wait=True):
        if wait:
            start.wait()
        outputs = []
        for _ in range(10 if wait else 1):
            with torch.no_grad(), model.posterior_samples(Sampling(2 + worker % 2, worker, layers=1 + worker % 2)):
                outputs.append(model(**repeat_rows(inputs, 2 + worker % 2)).logits)
        return outputs

    expected = [answer(worker, wait=False)[0] for worker in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for worker, outputs in enumerate(pool.map(answer, range(6))):
            assert all(torch.allclose(one, expected[worker], atol=1e-6) for one in outputs)


def test_numbers_of_layers_that_there_are_not_are_refused():
    for family, count in (("bert", 2), ("bart", 4)):
        block = blob(family).posterior_samples(Sampling(2, layers=count + 1))
        with pytest.raises(BlobError, match=f"last layers must be 1 to {count}, .* got {count + 1}") as error:
            block.__enter__()
        assert "\n" not in str(error.value)


def test_models_whose_layers_cannot_be_found_are_refused():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    with pytest.raises(BlobError, match="the layers of Plain cannot be found: .* here are 0"):
        layer_stacks(Plain())


@pytest.mark.parametrize(("posterior_layers", "layers"), [(None, 1), (1, None)])
def test_rows_that_choose_their_adapter_do_not_share_layers(posterior_layers, layers):
    model = blob("bert", posterior_layers=posterior_layers)
    model.add_adapter("second", BlobConfig(target_modules=["query", "value"], init_eps=0.9))  # everywhere
    randomize_b(model)
    ids, names, sampling = random_ids(3, 6), ["default", "second", "default"], Sampling(3, 2, layers=layers)
    with torch.no_grad(), model.posterior_samples(sampling):
        mixed = model(input_ids=ids.repeat(3, 1), adapter_names=names * 3).logits.unflatten(0, (3, -1))
    for row, name in enumerate(names):
        model.set_adapter(name)
        with torch.no_grad(), model.posterior_samples(sampling):
            alone = model(input_ids=ids[row : row + 1].repeat(3, 1)).logits
        torch.testing.assert_close(mixed[:, row], alone)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_of_a_fixed_size_has_all_rows(beams):
    model, inputs = blob("llama"), inputs_for("llama")
    options = {"sampling": Sampling(3, 5, layers=1), "max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, cache_implementation="static", **options), expected)


def test_layers_that_get_a_row_for_each_head_are_not_shared(caplog):
    """BLOOM's ALiBi."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2)
    base = BloomForCausalLM(config).eval()
    model = get_blob_model(base, BlobConfig(target_modules=["query_key_value"], init_eps=0.9)).eval()
    randomize_b(model)
    ids = random_ids(2, 6)
    with torch.no_grad():
        with model.posterior_samples(Sampling(3, 1, layers=1), repeat=True):
            found = model(input_ids=ids).logits
        for s in range(3):
            with model.posterior_samples(Sampling(1, 1, first=s, layers=1)):
                torch.testing.assert_close(found[2 * s : 2 * s + 2], model(input_ids=ids).logits)
    assert "takes alibi, by which its layers are not shared" in caplog.text
