"""`model.predict` against a loop over the sampled networks, one plain forward for each text."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.adapters import trained
from helpers.models import TARGETS, randomize_b, tiny_bert, tiny_gpt2, tiny_tokenizer, words
from peft import LoraConfig

from blob_hf import BlobConfig, BlobModel, Sampling, attach_mc_dropout, get_blob_model, get_lora_model, join_members
from blob_hf.baselines.laplace import LaplaceState, attach_factors, lora_weights
from blob_hf.baselines.linearized import Factors, linearized_prediction
from blob_hf.baselines.temperature import Temperatures
from blob_hf.metrics.similarity import minimum_bayes_risk, pairwise, rouge_utility
from blob_hf.tuner.posterior import sampled_layers
from blob_hf.utils.errors import BlobError

NAMES = {0: "no", 1: "perhaps", 2: "yes"}
SEED = 3


def classifier():
    model = get_blob_model(tiny_bert(), BlobConfig(target_modules=TARGETS["bert"], init_eps=0.9))
    return named(model)


def named(model):
    randomize_b(model)
    model.get_base_model().config.id2label = NAMES
    return model.eval()


@torch.no_grad()
def by_hand(model, texts, samples, seed=SEED):
    """Probabilities `(inputs, samples, classes)`: one text, one network, one forward; no padding."""
    tokenizer, rows = tiny_tokenizer(), []
    for text in texts:
        encoded = tokenizer(*([text] if isinstance(text, str) else text), return_tensors="pt")
        rows.append([])
        for s in range(samples):
            with model.posterior_samples(Sampling(1, seed=seed, first=s)):
                rows[-1].append(model(**encoded).logits[0].double().softmax(-1).numpy())
    return np.array(rows)


def entropy(p):
    return -(p * np.log(p)).sum(-1)


def check(found, expected):
    close = {"rtol": 1e-4, "atol": 1e-6}
    mean = expected.mean(axis=1)
    np.testing.assert_allclose(found.sample_probabilities, expected, **close)
    np.testing.assert_allclose(found.probabilities, mean, **close)
    np.testing.assert_allclose(found.probabilities.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(found.std, expected.std(axis=1), **close)
    np.testing.assert_allclose(found.entropy, entropy(mean), **close)
    np.testing.assert_allclose(found.aleatoric, entropy(expected).mean(axis=1), **close)
    np.testing.assert_allclose(found.epistemic, entropy(mean) - entropy(expected).mean(axis=1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.entropy, found.aleatoric + found.epistemic, rtol=1e-9)
    assert found.labels == [found.class_names[i] for i in mean.argmax(-1)]
    np.testing.assert_allclose(found.confidence, mean.max(-1), **close)


@pytest.mark.parametrize("batch_size, per_forward", [(1, None), (3, 2), (32, 4)])
def test_a_classifier_answers_as_a_loop_over_its_networks(batch_size, per_forward):
    model, texts = classifier(), words(7)
    sampling = Sampling(4, SEED, batch_size=per_forward)
    found = model.predict(texts, tiny_tokenizer(), sampling, batch_size=batch_size)
    assert len(found) == 7 and found.class_names == list(NAMES.values())
    check(found, by_hand(model, texts, 4))
    assert found.epistemic.max() > 1e-3
    record = found.records()[2]
    assert record["label"] == found.labels[2] and list(record["probabilities"]) == list(NAMES.values())
    proba = model.predict_proba(texts, tiny_tokenizer(), sampling)
    np.testing.assert_allclose(proba, found.probabilities, rtol=1e-5)


def test_every_form_of_input_gives_the_same_answers():
    model, texts, tokenizer = classifier(), words(5), tiny_tokenizer()
    pairs = [list(pair) for pair in zip(texts, words(5, seed=1), strict=True)]
    expected = {"one": by_hand(model, texts, 2), "two": by_hand(model, pairs, 2)}
    columns = {"sentence1": [a for a, _ in pairs], "sentence2": [b for _, b in pairs]}
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    data = Dataset.from_dict({"text": texts, "label": [0] * 5, "id": [str(i) for i in range(5)]})
    for kind, inputs in (
        ("one", texts), ("one", tuple(texts)), ("one", np.array(texts)), ("one", batch), ("one", dict(batch)),
        ("one", tokenizer(texts)), ("one", data), ("one", data.map(lambda row: tokenizer(row["text"]))),
        ("one", {**batch, "labels": torch.zeros(5, dtype=torch.long)}), ("two", pairs),
        ("two", [tuple(pair) for pair in pairs]), ("two", Dataset.from_dict(columns)),
    ):  # fmt: skip
        found = model.predict(inputs, tokenizer, Sampling(2, SEED))
        np.testing.assert_allclose(found.sample_probabilities, expected[kind], rtol=1e-4, atol=1e-6)
    for single in (texts[0], [texts[0]], tokenizer(texts[0]), tokenizer(texts[0], return_tensors="pt")):
        found = model.predict(single, tokenizer, Sampling(2, SEED))
        assert found.probabilities.shape == (1, 3)
        np.testing.assert_allclose(found.sample_probabilities, expected["one"][:1], rtol=1e-4, atol=1e-6)
    assert model.predict_proba(batch, sampling=2).shape == (5, 3)  # token ids need no tokenizer


def test_nothing_but_the_answer_changes():
    model = classifier()
    model.train()
    inner = model.get_base_model().bert.encoder
    inner.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    found = model.predict(words(3), tiny_tokenizer(), Sampling(2, SEED))
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(BlobError):
        model.predict([3], tiny_tokenizer())
    assert [module.training for module in model.modules()] == modes
    check(found, by_hand(model.eval(), words(3), 2))


def test_the_tokenizer_is_that_of_the_adapter_or_else_of_the_base_model(tmp_path):
    model = trained("bert", tmp_path / "base")
    texts, tokenizer = words(4), tiny_tokenizer()
    expected = model.predict_proba(texts, tokenizer, 2)
    model.save_pretrained(tmp_path / "adapter")
    loaded = BlobModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(
        BlobError, match=f"no tokenizer is saved with the adapter in {tmp_path / 'adapter'}.*tokenizer="
    ):
        loaded.predict(texts)
    tokenizer.save_pretrained(tmp_path / "base")
    np.testing.assert_array_equal(loaded.predict_proba(texts, sampling=2), expected)
    other = tiny_tokenizer()
    other.add_tokens(["w70"])
    other.save_pretrained(tmp_path / "adapter")
    again = BlobModel.from_pretrained(tmp_path / "adapter")
    np.testing.assert_array_equal(again.predict_proba(texts, sampling=2), expected)
    assert len(again.tokenizers["default"]) == len(tokenizer) + 1
    with pytest.raises(BlobError, match="which was not loaded, and the base model has no name"):
        classifier().predict(texts)


# ----- every method -----------------------------------------------------------------------------------------------


def lora(dropout=0.0):
    config = LoraConfig(target_modules=["query", "value", "classifier"], r=4, lora_dropout=dropout)
    return named(get_lora_model(tiny_bert(), config))


def test_a_point_has_one_network():
    model = lora()
    found = model.predict(words(4), tiny_tokenizer(), Sampling(5))
    assert found.sample_probabilities.shape == (4, 1, 3)
    assert (found.std == 0).all() and (found.epistemic == 0).all()
    batch = tiny_tokenizer()(words(4), padding=True, return_tensors="pt")
    np.testing.assert_allclose(found.probabilities, model(**batch).logits.softmax(-1).detach(), rtol=1e-4)
    np.testing.assert_allclose(
        classifier().predict_proba(words(4), tiny_tokenizer(), 0).shape, (4, 3)
    )  # the posterior mean


def test_mc_dropout_and_ensembles_answer_with_their_own_networks(tmp_path):
    model = attach_mc_dropout(lora(0.4))
    check(model.predict(words(4), tiny_tokenizer(), Sampling(3, SEED)), by_hand(model, words(4), 3))
    torch.manual_seed(1)
    base = tiny_bert()
    for member in ("a", "b"):
        torch.manual_seed(ord(member))
        one = named(get_lora_model(type(base)(base.config), LoraConfig(target_modules=["query", "value"], r=4)))
        one.save_pretrained(tmp_path / member)
    model = BlobModel.from_pretrained(tmp_path / "a", model=base)
    if model.has_posterior:  # of a plain adapter: an ensemble is of points
        model = named(get_lora_model(type(base)(base.config), LoraConfig(target_modules=["query", "value"], r=4)))
    join_members(model, [tmp_path / "b"])
    found = model.predict(words(4), tiny_tokenizer(), Sampling(10, SEED))
    assert found.sample_probabilities.shape == (4, 2, 3)
    check(found, by_hand(model, words(4), 2))


def test_laplace_answers_with_its_linearised_network():
    model = lora()
    factors = {}
    for name, weight in lora_weights(model, "all").items():
        out, width = weight.shape
        parts = torch.rand(out), torch.rand(width), torch.linalg.qr(torch.randn(out, out))[0], torch.eye(width)
        factors[name] = Factors(*parts)
    attach_factors(model, factors, 3.0)
    model.set_companion(LaplaceState(3.0))
    texts, tokenizer = words(4), tiny_tokenizer()
    found = model.predict(texts, tokenizer, Sampling(3, SEED))
    for row, text in enumerate(texts):
        alone = linearized_prediction(model, dict(tokenizer(text, return_tensors="pt")), Sampling(3, SEED))
        np.testing.assert_allclose(
            found.sample_probabilities[row], alone.sample_log_probs[0].exp(), rtol=2e-3, atol=1e-5
        )
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("samples, temperature", [(3, 2.5), (0, 0.5)])
def test_a_fitted_temperature_is_applied_to_the_averaged_probabilities(samples, temperature):
    model, texts = classifier(), words(4)
    plain = model.predict(texts, tiny_tokenizer(), Sampling(samples, SEED))
    model.set_companion(Temperatures(predictive=2.5, mean=0.5))
    found = model.predict(texts, tiny_tokenizer(), Sampling(samples, SEED))
    expected = plain.probabilities ** (1 / temperature)
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-9)
    np.testing.assert_allclose(found.entropy, entropy(expected), rtol=1e-9)
    for name in ("sample_probabilities", "aleatoric", "epistemic"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))


# ----- models that write ------------------------------------------------------------------------------------------


def writer(family, tmp_path):
    model = trained(family, tmp_path / "base", init_eps=0.9)
    model.generation_config.eos_token_id = [2, *range(20, 26)]
    return model


@pytest.mark.parametrize("family", ["bart", "gpt2"])
@pytest.mark.parametrize("decoding", ["predictive", "mbr"])
def test_texts_are_those_of_each_input_and_network_alone(family, decoding, tmp_path):
    model, texts, tokenizer = writer(family, tmp_path), words(4), tiny_tokenizer()
    options = {"max_new_tokens": 7, "decoding": decoding}
    found = model.predict(texts, tokenizer, Sampling(3, SEED), batch_size=3, **options)
    assert len(found) == 4 and [len(samples) for samples in found.samples] == [3] * 4
    for row, text in enumerate(texts):
        encoded = tokenizer(text, return_tensors="pt")
        start = 1 if family == "bart" else encoded.input_ids.shape[1]
        ids = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        for s in range(3):
            with model.posterior_samples(Sampling(1, SEED, first=s)):
                alone = model.generate(**ids, max_new_tokens=7, do_sample=False, pad_token_id=0)[0, start:]
            assert tokenizer.decode(alone, skip_special_tokens=True).strip() == found.samples[row][s]
        if decoding == "mbr":
            choice = minimum_bayes_risk(pairwise(found.samples[row], rouge_utility())).index
            assert found.texts[row] == found.samples[row][choice]
        # the uncertainty of each token, from plain forwards over the chosen text
        tokens = torch.tensor([token for token in found.tokens[row] if token != -100])
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == found.texts[row]
        probs = []
        for s in range(3):
            with torch.no_grad(), model.posterior_samples(Sampling(1, SEED, first=s)):
                if family == "bart":
                    begin = torch.tensor([model.config.decoder_start_token_id])
                    decoder = torch.cat([begin, tokens[:-1]]).unsqueeze(0)
                    logits = model(**ids, decoder_input_ids=decoder).logits[0]
                else:
                    logits = model(torch.cat([ids["input_ids"][0], tokens[:-1]]).unsqueeze(0)).logits[0, start - 1 :]
            probs.append(logits.double().softmax(-1).numpy())
        probs = np.array(probs)
        total, aleatoric = entropy(probs.mean(0)), entropy(probs).mean(0)
        count, unsure = len(tokens), found.token_uncertainty
        own = np.log(probs.mean(0)[np.arange(count), tokens])
        for value, expected in (
            (unsure.total, total), (unsure.aleatoric, aleatoric), (unsure.epistemic, total - aleatoric),
            (unsure.log_probs, own),
        ):  # fmt: skip
            np.testing.assert_allclose(value[row, :count], expected, rtol=1e-3, atol=1e-4)
            assert (value[row, count:] == 0).all()
        scores = {name: values[row] for name, values in found.uncertainty.items()}
        assert scores["token_nll"] == pytest.approx(-own.mean(), rel=1e-3)
        assert scores["token_entropy"] == found.entropy[row] == pytest.approx(total.mean(), rel=1e-3)
        assert scores["mutual_information"] == pytest.approx((total - aleatoric).mean(), rel=1e-2, abs=1e-4)
    assert found.uncertainty["dissimilarity"].max() > 0


def test_without_samples_the_posterior_mean_writes(tmp_path):
    model, texts, tokenizer = writer("bart", tmp_path), words(3), tiny_tokenizer()
    found = model.predict(texts, tokenizer, 0, max_new_tokens=6)
    for row, text in enumerate(texts):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=6)[0, 1:]
        assert tokenizer.decode(alone, skip_special_tokens=True).strip() == found.texts[row]
    assert found.samples == [[], [], []] and (found.uncertainty["mutual_information"] == 0).all()
    asked = model.predict("w5", tokenizer, 0, max_new_tokens=6, prompt="w7 {dialogue} w8")
    assert asked.texts == model.predict("w7 w5 w8", tokenizer, 0, max_new_tokens=6).texts


def test_mistakes_are_one_line(tmp_path):
    model, tokenizer = classifier(), tiny_tokenizer()
    data = Dataset.from_dict({"a": ["w4"], "b": ["w5"]})
    for inputs, message in (
        ([], "nothing to predict"), ([3], "row 0 is not a text"), ([("w4", "w5"), "w6"], "row 1 has 1 texts"),
        ({"texts": ["w4"]}, "has input_ids; this one has texts"), (7, "not int"),
        (data, "several columns could be the texts: a, b"),
        (DatasetDict(test=data), "splits test"), ([("w4", "w5", "w6")], "row 0 has 3 texts"),
        ({"input_ids": [[4, 5]], "attention_mask": [[1, 1], [1, 1]]}, "different numbers of rows"),
    ):  # fmt: skip
        with pytest.raises(BlobError, match=message):
            model.predict(inputs, tokenizer)
    assert model.predict_proba(data, tokenizer, 1, text_columns=["b"]).shape == (1, 3)
    with pytest.raises(BlobError, match="no column 'c'"):
        model.predict(data, tokenizer, text_columns=["c"])
    with pytest.raises(BlobError, match="batch_size must be >= 1"):
        model.predict("w4", tokenizer, batch_size=0)
    with pytest.raises(BlobError, match="decoding: not for a classifier"):
        model.predict("w4", tokenizer, decoding="mbr")
    causal = get_blob_model(tiny_gpt2(), BlobConfig(target_modules=["c_attn"], task_type="CAUSAL_LM"))
    for options, message in (
        ({"decoding": "samples", "max_new_tokens": 5}, "predictive, mbr, got 'samples'"),
        ({"do_sample": True, "max_new_tokens": 5}, "greedily or with beams"),
        ({"max_new_tokens": 60}, "60 new tokens leave no room for a text: the model takes 40"),
    ):  # fmt: skip
        with pytest.raises(BlobError, match=message):
            causal.predict("w4", tokenizer, **options)
    with pytest.raises(BlobError, match="predict_proba is for classifiers, not for GPT2LMHeadModel"):
        causal.predict_proba("w4", tokenizer, 1, max_new_tokens=2)
    regressor = get_blob_model(tiny_bert(1), BlobConfig(target_modules=["query"]))
    with pytest.raises(BlobError, match="two or more classes; this model has 1"):
        regressor.predict("w4", tokenizer)
    assert sampled_layers(model)


# ----- the order of rows ------------------------------------------------------------------------------------------


def test_networks_and_rows_are_in_one_order_everywhere(tmp_path):
    """Inside `posterior_samples` rows are sample-major; what users get is (inputs, samples, ...), flat or not."""
    model = writer("bart", tmp_path)
    ids = tiny_tokenizer()(words(2), padding=True, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    flat = model.generate(ids, sampling=Sampling(3, SEED), **options).logits[0].unflatten(0, (2, 3))
    start = torch.full((6, 1), model.config.decoder_start_token_id)
    with torch.no_grad(), model.posterior_samples(3, seed=SEED):
        inside = model(ids.repeat(3, 1), decoder_input_ids=start).logits[:, -1].unflatten(0, (3, 2)).transpose(0, 1)
    torch.testing.assert_close(flat, inside)
    for s in range(3):
        with torch.no_grad(), model.posterior_samples(Sampling(1, SEED, first=s)):
            alone = model(ids, decoder_input_ids=start[:2]).logits[:, -1]
        torch.testing.assert_close(flat[:, s], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(flat[:, 0], flat[:, 1])
