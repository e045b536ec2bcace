"""Causal models that are asked: conversations, ragged rows, where answers end, against decoding by hand row by row."""

import logging
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.adapters import one_line
from helpers.chat import ENDS, by_hand, causal, networks
from helpers.models import tiny_bart, words
from helpers.sft import CHAT, llama, tokenizer
from huggingface_hub.utils import filter_repo_objects

from blob_hf import BlobConfig, BlobModel, Sampling, get_blob_model
from blob_hf.inference.generate import generate_predictive
from blob_hf.inference.inputs import find_tokenizer
from blob_hf.inference.stopping import StopStrings, end_tokens
from blob_hf.inference.uncertainty import likeliest
from blob_hf.inference.writing import LexicalEquivalence
from blob_hf.metrics.semantics import SEMANTIC_SCORES, semantic_scores
from blob_hf.tuner import adapter_files

SEED, SAMPLES, NEW = 3, 3, 6
QUESTIONS = words(4, longest=9, seed=1)


def user(text):
    return [{"role": "user", "content": text}]


def rendered(text):
    return tokenizer()(f"[SEP] user {text} [SEP] assistant").input_ids


def ask(model, inputs=None, samples=SAMPLES, **options):
    inputs = [user(text) for text in QUESTIONS] if inputs is None else inputs
    return model.predict(inputs, tokenizer(), Sampling(samples, SEED), **{"max_new_tokens": NEW, **options})


def text_of(tokens):
    return tokenizer().decode([token for token in tokens if token >= 0], skip_special_tokens=True).strip()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "family, per_batch",
    [("llama", 2), ("gpt2", None), pytest.param("llama", None, marks=SLOW), pytest.param("gpt2", 2, marks=SLOW)],
)
def test_a_row_of_a_ragged_batch_is_the_row_alone(family, per_batch):
    """Positions by rotation and absolute ones; each sample, and the average of all at each token."""
    model = causal(family)
    inputs = [user(text) for text in QUESTIONS]
    sampling = Sampling(SAMPLES, SEED, batch_size=per_batch)
    found = model.predict(inputs, tokenizer(), sampling, max_new_tokens=NEW, batch_size=3)
    alone = networks(model, SAMPLES, SEED)
    lengths = set()
    for row, question in enumerate(QUESTIONS):
        tokens, unsure = by_hand(alone, rendered(question), NEW)
        count = len(tokens)
        assert found.tokens[row, :count].tolist() == tokens and (found.tokens[row, count:] == -100).all()
        assert found.texts[row] == text_of(tokens)
        own = found.token_uncertainty
        values = torch.stack([own.log_probs, own.total, own.aleatoric], dim=-1)[row]
        torch.testing.assert_close(values[:count].double(), unsure.double(), rtol=1e-3, atol=1e-4)
        epistemic = (unsure[:, 1] - unsure[:, 2]).clamp(min=0)
        torch.testing.assert_close(own.epistemic[row, :count], epistemic, rtol=1e-3, atol=1e-4)
        assert not values[count:].any()
        for index, network in enumerate(alone):
            tokens, unsure = by_hand([network], rendered(question), NEW)
            assert found.samples[row][index] == text_of(tokens)
            assert found.sample_log_probs[row, index] == pytest.approx(float(unsure[:, 0].sum()), rel=1e-4)
            lengths.add(len(tokens))
    assert len(lengths) > 1  # some answers end early
    assert len({text for texts in found.samples for text in texts}) > len(QUESTIONS)


@SLOW
def test_log_likelihoods_with_beams_are_those_of_a_forward():
    model = causal("llama")
    found = ask(model, num_beams=2)
    for index, network in enumerate(networks(model, SAMPLES, SEED)):
        for row, question in enumerate(QUESTIONS):
            ids = torch.tensor([rendered(question)])
            options = {"num_beams": 2, "max_new_tokens": NEW, "eos_token_id": ENDS, "pad_token_id": 0}
            whole = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
            new = whole[0, ids.shape[1] :]
            with torch.no_grad():
                log_probs = network(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
            expected = log_probs.gather(-1, new.unsqueeze(-1)).sum()
            assert found.sample_log_probs[row, index] == pytest.approx(float(expected), rel=1e-3)


def test_every_form_of_a_conversation_is_the_same():
    model = causal("llama")
    answers = partial(ask, model, samples=2, max_new_tokens=3)
    expected = answers().tokens
    table = {"messages": [user(text) for text in QUESTIONS]}
    answered = [[*one, {"role": "assistant", "content": "w9"}] for one in table["messages"]]
    sharegpt = [[{"from": "user", "value": text}] for text in QUESTIONS]
    for inputs in (
        Dataset.from_dict(table), Dataset.from_dict({"prompt": table["messages"], "completion": ["w9"] * 4}),
        Dataset.from_dict({"messages": answered}), Dataset.from_dict({"conversations": sharegpt}),
        [{"messages": one} for one in answered], [{"prompt": one, "messages": user("w4")} for one in table["messages"]],
        [tuple(one) for one in table["messages"]], {"input_ids": list(map(rendered, QUESTIONS))},
        [f"[SEP] user {text} [SEP] assistant" for text in QUESTIONS],
        Dataset.from_dict({"prompt": [f"[SEP] user {text} [SEP] assistant" for text in QUESTIONS], "text": ["w4"] * 4}),
    ):  # fmt: skip
        np.testing.assert_array_equal(answers(inputs).tokens, expected)
    one = answers(user(QUESTIONS[1]))
    assert len(one) == 1 and one.texts == answers({"prompt": user(QUESTIONS[1])}).texts
    kept = expected[1][expected[1] >= 0]
    assert one.tokens[0].tolist() == kept.tolist()
    mixed = answers([user(QUESTIONS[1]), f"[SEP] user {QUESTIONS[2]} [SEP] assistant"])
    assert mixed.texts == [text_of(row) for row in expected[1:3]]
    half = [*user(QUESTIONS[0]), {"role": "assistant", "content": "w9"}]  # of a prompt the end is part of it
    whole = f"[SEP] user {QUESTIONS[0]} [SEP] assistant w9 [END] [SEP] assistant"
    assert answers({"prompt": half}).texts == answers(whole).texts


# ----- where an answer ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=SLOW)])
def test_each_row_ends_before_its_own_stop_string(family):
    model = causal(family, ends=None)
    plain = tokenizer()
    plain.eos_token = None
    plain.chat_template = CHAT.replace("[END]", "")
    sampling = Sampling(SAMPLES, SEED)
    alone = networks(model, SAMPLES, SEED)
    texts = [
        by_hand([alone[index % SAMPLES]], rendered(question), 12, ())[0] for index, question in enumerate(QUESTIONS)
    ]
    stops = [" ".join(tokenizer().convert_ids_to_tokens(texts[1][3:5])), tokenizer().convert_ids_to_tokens(texts[2])[7]]
    questions = [f"{question} {stops[0]}" for question in QUESTIONS]  # in the prompt it stops nothing
    options = {"max_new_tokens": 12, "pad_token_id": 2, "stop_strings": stops}
    found = model.predict([user(question) for question in questions], plain, sampling, batch_size=3, **options)
    ended = 0
    for row, question in enumerate(questions):
        cases = [(found.tokens[row], found.texts[row], alone, None)]
        cases += [(None, text, [alone[index]], index) for index, text in enumerate(found.samples[row])]
        for tokens, text, models, index in cases:
            expected, unsure = by_hand(models, rendered(question), 12, ())
            spelled = [tokenizer().decode(expected[:count]) for count in range(13)]
            hits = [count for count, one in enumerate(spelled) if any(stop in one for stop in stops)]
            count = min(hits, default=12)
            ended += bool(hits)
            whole = spelled[count]
            cut = min((whole.find(stop) for stop in stops if stop in whole), default=len(whole))
            assert text_of(plain(whole[:cut]).input_ids) == text
            if tokens is not None:
                assert tokens[tokens >= 0].tolist() == expected[:count]
                total = found.token_uncertainty.total[row].double()
                torch.testing.assert_close(total[:count], unsure[:count, 1].double(), rtol=1e-3, atol=1e-4)
                assert not total[count:].any()
            else:
                log_prob = float(unsure[:count, 0].sum())
                assert found.sample_log_probs[row, index] == pytest.approx(log_prob, rel=1e-4)
    assert 1 < ended < len(questions) * (SAMPLES + 1)


def test_answers_end_where_the_chat_template_ends_them():
    model, own = causal("llama", ends=7), tokenizer()
    own.eos_token = "[SEP]"
    assert end_tokens(model, own, of_turns=False) == [7, 3]
    assert end_tokens(model, own, of_turns=True) == [7, 3, 2]
    own.chat_template = None
    assert end_tokens(model, own, of_turns=True) == [7, 3]
    free = ask(causal("llama", ends=None), eos_token_id=[59], max_new_tokens=12)
    end = int(free.tokens[0, 1])
    with_end = tokenizer(CHAT.replace("[END]", f"w{end}"))  # not a special token: part of the text
    assert end_tokens(model, with_end, of_turns=True) == [7, 2]


# ----- what is too long, what is wrong ----------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_loses_its_beginning(caplog):
    model = causal("gpt2")  # 40 positions
    long = " ".join(f"w{4 + i % 50}" for i in range(60))
    kept = tokenizer()(long).input_ids[-(40 - NEW) :]
    with caplog.at_level(logging.WARNING, logger="blob_hf"):
        found = ask(model, [long, "w5"], samples=2)
    assert found.texts[0] == ask(model, {"input_ids": [kept]}, samples=2).texts[0]
    assert caplog.messages == ["1 of 2 prompts are longer than 34 tokens and lose their beginning"]
    kept = rendered(QUESTIONS[0])[-5:]
    expected = ask(model, {"input_ids": [kept]}, samples=2).texts
    assert ask(model, user(QUESTIONS[0]), samples=2, max_length=5).texts == expected


def test_mistakes_are_one_line():
    model = causal("llama")
    for inputs, message in (
        ([[]], "the conversation of row 0 is empty"),
        ([user("w4"), []], "the conversation of row 1 is empty"),
        ({"messages": [{"role": "assistant", "content": "w4"}]}, "row 0 is empty but for the answer"),
        ([user("w4"), [{"role": "user"}]], "message 0 of row 1 has no content, only role"),
        ([[{"content": "w4"}]], "message 0 of row 0 has no role, only content"),
        ([[{"role": "user", "content": ["w4"]}]], "the content of message 0 of row 0 is not a text"),
        ([[{"role": "user", "content": None}]], "message 0 of row 0 has no content"),
        ([user("w4"), 3], "row 1 is neither a text nor a list of messages: '3'"),
        ([{"prompt": 3}], "the prompt of row 0 is neither a text nor"),
        ([[*user("w4"), "w5"]], "message 1 of row 0 is not a dict"),
        ({"dialog": user("w4")}, "row 0 has no prompt, messages or text, only dialog"),
        ({"messages": user("w4"), "tools": "[]"}, "row 0 has tools, which are not read"),
        ([""], "row 0 has no text to go on from"),
    ):
        one_line(message, lambda inputs=inputs: ask(model, inputs))
    strict = tokenizer("{{ raise_exception('roles must be user and assistant') }}")
    for own, message in (
        (tokenizer(None), "the tokenizer has no chat template; give texts"),
        (strict, "chat template refuses the conversation of row 0: roles must be user and assistant"),
    ):
        one_line(message, lambda own=own: model.predict(user("w4"), own, 2, max_new_tokens=2))
    for options, message in (
        ({"stop_strings": [""]}, "stop_strings must be texts that are not empty"),
        ({"stop_strings": []}, "stop_strings must be texts"),
        ({"prompt": "w4 {dialogue}"}, "a prompt has room for one text, but the rows are pairs or conversations"),
        ({"equivalence": LexicalEquivalence(), "samples": 1}, "two or more sampled answers; there are 1"),
        ({"equivalence": "no/such-model"}, "cannot get the NLI model 'no/such-model'"),
    ):
        one_line(message, lambda options=options: ask(model, **options))
    bart = get_blob_model(tiny_bart(), BlobConfig(target_modules=["q_proj"]))
    one_line("row 0 is not a text or a pair", lambda: bart.predict([user("w4")], tokenizer(), 2))


# ----- do the sampled answers mean the same -----------------------------------------------------------------------


def test_scores_of_meaning_are_those_of_the_sampled_answers():
    model = causal("llama")
    asked = []

    def first_word(texts, question):
        asked.append(question)
        return LexicalEquivalence(threshold=0.0, short=0)([text.split(" ")[0] for text in texts])

    alone = networks(model, 3, SEED)
    counts = [[len(by_hand([network], rendered(question), NEW)[0]) for network in alone] for question in QUESTIONS]
    for equivalence, own in ((None, LexicalEquivalence()), (first_word, first_word)):
        found = ask(model, equivalence=equivalence)
        for row, question in enumerate(QUESTIONS):
            weights = found.sample_log_probs[row] / counts[row]
            expected, sets = semantic_scores(found.texts[row], found.samples[row], weights, question, own)
            assert sets == found.sample_sets[row]
            for name in SEMANTIC_SCORES:
                assert found.uncertainty[name][row] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
        assert found.records()[0]["sample_sets"] == found.sample_sets[0]
    assert set(asked) == set(QUESTIONS)


def test_one_sample_neither_agrees_nor_disagrees():
    model = causal("llama")
    for samples in (0, 1):
        found = ask(model, samples=samples)
        assert set(found.uncertainty) == {"token_nll", "token_entropy", "token_aleatoric", "mutual_information"}
        assert found.sample_log_probs.shape == (4, samples) and "sample_sets" not in found.records()[0]


def test_of_equally_likely_tokens_the_one_that_argmax_takes_is_recorded():
    """In bfloat16 they are common, and topk may take another."""
    scores = torch.randn(500, 60).bfloat16().float()
    assert torch.equal(likeliest(scores, 1)[1].squeeze(-1), scores.argmax(-1))
    assert not torch.equal(scores.topk(1).indices.squeeze(-1), scores.argmax(-1))


def test_decoding_is_over_when_all_rows_have_their_stop_string():
    model, own = causal("llama", ends=None), tokenizer()
    ids = own(["w5 w6 w5 w7", "w5 w6 w5 w6", "w4 w4 w5 w6"], return_tensors="pt").input_ids
    assert StopStrings(own, ["w5 w6"], start=2)(ids, None).tolist() == [False, True, True]
    prompt = {"input_ids": torch.tensor([rendered(QUESTIONS[0])])}
    free = generate_predictive(model, prompt, 2, max_new_tokens=20)
    assert free.tokens.shape == (1, 20)
    stop = own.decode(free.tokens[0, 2:4])
    found = generate_predictive(model, prompt, 2, max_new_tokens=20, stop_strings=stop, tokenizer=own)
    assert found.sequences.shape[1] < len(prompt["input_ids"][0]) + 5 and own.decode(found.tokens[0]).endswith(stop)
    one_line("stop_strings need the tokenizer", lambda: generate_predictive(model, prompt, 2, stop_strings=stop))


def test_the_chat_template_of_an_adapter_on_the_hub_is_fetched_with_it(tmp_path, monkeypatch):
    def snapshot(repo, patterns, *_):
        for name in filter_repo_objects([path.name for path in (tmp_path / repo).iterdir()], allow_patterns=patterns):
            shutil.copy(tmp_path / repo / name, tmp_path / "cache" / name)
        return tmp_path / "cache"

    (tmp_path / "cache").mkdir()
    causal("llama").save_pretrained(tmp_path / "me/chat")
    tokenizer().save_pretrained(tmp_path / "me/chat")
    (tmp_path / "me/chat/report.md").write_text("not needed")
    monkeypatch.setattr(adapter_files.hub, "snapshot", snapshot)
    loaded = BlobModel.from_pretrained("me/chat", model=llama())
    assert find_tokenizer(loaded).chat_template == CHAT and not (tmp_path / "cache/report.md").exists()
