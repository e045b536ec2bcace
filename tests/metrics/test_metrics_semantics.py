"""Semantic entropy and the graph of likenesses against their definitions; NLI against plain forwards, pair by pair."""

import math

import numpy as np
import pytest
import torch
from helpers.adapters import one_line
from helpers.models import tiny_tokenizer
from transformers import BertConfig, BertForSequenceClassification

from blob_hf.metrics.entailment import EntailmentEquivalence
from blob_hf.metrics.semantics import (
    LexicalEquivalence,
    Relations,
    degree_uncertainty,
    eigenvalue_uncertainty,
    normalized_answer,
    semantic_entropy,
    semantic_scores,
    semantic_sets,
)
from blob_hf.metrics.similarity import pairwise, rouge_utility


def test_an_answer_joins_the_first_set_that_means_the_same():
    same = np.eye(4, dtype=bool)
    same[0, 2] = same[2, 0] = same[2, 3] = same[3, 2] = same[1, 3] = same[3, 1] = True
    assert semantic_sets(same).tolist() == [0, 1, 0, 1]  # 3 is as 2, but not as the first of that set
    assert semantic_sets(np.ones((3, 3), dtype=bool)).tolist() == [0, 0, 0]


def test_entropies_over_meanings_by_hand():
    sets = [0, 1, 0, 2]
    assert semantic_entropy(sets) == pytest.approx(-0.5 * math.log(0.5) - 2 * 0.25 * math.log(0.25))
    weights = np.log([0.3, 0.2, 0.1, 0.2])  # of all probability mass
    shares = [0.4 / 0.8, 0.2 / 0.8, 0.2 / 0.8]
    assert semantic_entropy(sets, weights) == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert semantic_entropy(sets, weights - 1000) == pytest.approx(semantic_entropy(sets, weights))  # no underflow
    assert semantic_entropy([0, 0, 0], [-1.0, -5.0, -2.0]) == 0
    assert semantic_entropy([0, 1], [0.0, -2000.0]) == pytest.approx(0)


def test_the_graph_of_cliques_has_as_many_eigenvalues_as_cliques():
    cliques = np.kron(np.eye(3), np.ones((2, 2)))
    assert eigenvalue_uncertainty(cliques) == pytest.approx(3)
    assert eigenvalue_uncertainty(np.ones((5, 5))) == pytest.approx(1)
    generator = np.random.default_rng(0)
    between = generator.uniform(size=(6, 6))
    between = (between + between.T) / 2
    np.fill_diagonal(between, 1)
    degree = np.diag(between.sum(1))
    random_walk = np.linalg.inv(degree) @ between  # 1 - lambda are its eigenvalues
    expected = np.maximum(np.linalg.eigvals(random_walk).real, 0).sum()
    assert eigenvalue_uncertainty(between) == pytest.approx(expected)
    assert degree_uncertainty(between) == pytest.approx(np.trace(6 * np.eye(6) - degree) / 36)


def test_short_answers_are_compared_word_by_word_and_long_ones_by_rouge():
    for one, other, equal in (
        ("Paris.", "paris", True), ("The 'Eiffel' tower!", "eiffel tower", True), ("1.5", "15", False),
        ("-5", "5", False), ("5%", "5", False), ("U.S.", "(u.s)", True), ("", "...", True),
    ):  # fmt: skip
        assert (normalized_answer(one) == normalized_answer(other)) is equal, (one, other)
    texts = [
        "Paris", "paris.", "Lyon", "It is the old city of Paris in France", "it is the old big city of Paris in France",
        "Nobody knows where all those people have gone",
    ]  # fmt: skip
    found = LexicalEquivalence()(texts)
    assert semantic_sets(found.same).tolist() == [0, 0, 1, 2, 2, 3] and (found.same == found.same.T).all()
    expected = pairwise(texts, rouge_utility())
    np.testing.assert_allclose(found.similarity, expected)
    assert semantic_sets(LexicalEquivalence(threshold=0.99)(texts).same).tolist() == [0, 0, 1, 2, 3, 4]
    assert semantic_sets(LexicalEquivalence(short=9)(texts).same).tolist() == [0, 0, 1, 2, 3, 4]
    close = ["one two three four five", "one two three four six"]
    assert not LexicalEquivalence()(close).same[0, 1] and LexicalEquivalence(short=4)(close).same[0, 1]


def test_scores_are_of_the_samples_and_disagreement_is_with_the_answer():
    def same_first_letter(texts, question):
        assert question == "who?"
        same = np.array([[one[:1] == other[:1] for other in texts] for one in texts])
        return Relations(same, same * 0.5 + np.eye(len(texts)) * 0.5)

    samples, weights = ["ab", "b", "a", "c"], np.log([0.4, 0.3, 0.2, 0.1])
    scores, sets = semantic_scores("b", samples, weights, "who?", same_first_letter)
    assert sets == [0, 1, 0, 2] and scores["semantic_sets"] == 3
    assert scores["disagreement"] == pytest.approx(3 / 4)
    assert scores["semantic_entropy"] == pytest.approx(semantic_entropy(sets, weights))
    assert scores["discrete_semantic_entropy"] == pytest.approx(semantic_entropy(sets))
    similarity = same_first_letter(samples, "who?").similarity
    assert scores["eigv"] == pytest.approx(eigenvalue_uncertainty(similarity))
    assert scores["degree"] == pytest.approx(degree_uncertainty(similarity))


def test_fewer_than_two_answers_are_refused():
    one = np.ones((1, 1))
    for call in (
        lambda: semantic_entropy([0]), lambda: eigenvalue_uncertainty(one), lambda: degree_uncertainty(one),
        lambda: semantic_scores("a", ["a"], [0.0], "", LexicalEquivalence()),
    ):  # fmt: skip
        one_line("two or more sampled answers, got 1; raise num_samples", call)
    one_line("a log-probability for each of 2 answers", lambda: semantic_entropy([0, 1], [0.0]))


# ----- a model of natural language inference ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def nli(tmp_path_factory):
    """A random classifier of pairs, so large in its weights that it is not of one opinion."""
    torch.manual_seed(0)
    names = {0: "CONTRADICTION", 1: "Entailment", 2: "NEUTRAL"}
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, id2label=names, label2id={name: index for index, name in names.items()},
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    folder = tmp_path_factory.mktemp("nli")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, model


def by_hand(model, premise, hypothesis):
    """Whether it is entailment, and the probability of that; one pair, no padding."""
    with torch.no_grad():
        probs = model(**tiny_tokenizer()(premise, hypothesis, return_tensors="pt")).logits[0].double().softmax(-1)
    return int(probs.argmax()) == 1, float(probs[1])


@pytest.mark.parametrize("question", [pytest.param("", marks=pytest.mark.slow), "w4 w5"])
def test_answers_mean_the_same_if_each_entails_the_other(nli, question):
    folder, model = nli
    texts = [f"w{first} w{second}" + " w9" * (first % 3) for first in (6, 7, 8) for second in (20, 30)]
    texts.append(texts[2])
    found = EntailmentEquivalence(str(folder), batch_size=7)(texts, question)
    opinions = set()
    for i, one in enumerate(texts):
        for j, other in enumerate(texts):
            there, back = ((True, 1.0),) * 2
            if one != other:
                there = by_hand(model, f"{question} {one}".strip(), f"{question} {other}".strip())
                back = by_hand(model, f"{question} {other}".strip(), f"{question} {one}".strip())
                opinions.add((there[0], back[0]))
            assert found.same[i, j] == (there[0] and back[0])
            assert found.similarity[i, j] == pytest.approx((there[1] + back[1]) / 2, rel=1e-4)
    assert {(True, True), (True, False)} <= opinions


def test_a_question_that_does_not_fit_is_left_out(nli):
    equivalence, texts = EntailmentEquivalence(str(nli[0])), ["w6 w7", "w20", "w30 w31"]
    long = " ".join(["w4"] * 30)
    np.testing.assert_array_equal(equivalence(texts, long).similarity, equivalence(texts).similarity)
    assert not np.allclose(equivalence(texts, "w4 w5").similarity, equivalence(texts).similarity)


def test_a_model_that_is_not_of_inference_is_refused(nli, tmp_path):
    model = BertForSequenceClassification(BertConfig.from_pretrained(nli[0], id2label={0: "bad", 1: "not_entailing"}))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    one_line("has a class called entailment; .* has bad, not_entailing", lambda: EntailmentEquivalence(str(tmp_path)))
    one_line("cannot get the NLI model .*gone.*compare answers by their words",
             lambda: EntailmentEquivalence(str(tmp_path / "gone")))  # fmt: skip


def test_an_answer_that_is_an_article_is_an_answer():
    same = LexicalEquivalence()(["A", "", "the", "B", "a"]).same
    assert same[0][4] and not same[0][1] and not same[0][2] and not same[1][2]
