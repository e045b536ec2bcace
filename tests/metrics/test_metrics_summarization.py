import evaluate
import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from blob_hf.metrics import MultiReferenceRouge, group_references, rouge, rouge_per_example, summarization
from blob_hf.utils.errors import BlobError

PREDICTIONS = ["Anna visits the doctors tomorrow.", "They argue about money", ""]
REFERENCES = [
    ["Anna will visit a doctor tomorrow.", "A visit to the doctor."],
    ["Bob and Ann are arguing about the money.", "They went home."],
    ["Nothing was said.", ""],
]


@pytest.mark.parametrize(("aggregate", "function"), [("max", max), ("mean", np.mean), ("min", min)])
@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_against_rouge_score_called_by_hand(name, aggregate, function):
    scorer = RougeScorer([name], use_stemmer=True)
    expected = [
        function([scorer.score(target=text, prediction=prediction)[name].fmeasure for text in texts])
        for prediction, texts in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    np.testing.assert_allclose(rouge_per_example(PREDICTIONS, REFERENCES, aggregate)[name], expected)
    corpus = rouge(PREDICTIONS, REFERENCES, aggregate)
    assert corpus[name] == pytest.approx(np.mean(expected))
    assert corpus[f"{name}_std"] == pytest.approx(np.std(expected))


def test_stemming_and_identity():
    assert rouge(["visiting doctors"], [["visit doctor"]])["rouge1"] == 1
    assert rouge(["a b c"], [["a b c"]]) == pytest.approx(
        {
            **dict.fromkeys(("rouge1", "rouge2", "rougeL"), 1),
            **dict.fromkeys(("rouge1_std", "rouge2_std", "rougeL_std"), 0),
        }
    )


def test_is_an_evaluate_metric_without_network():
    for metric in (MultiReferenceRouge(), evaluate.load(summarization.__file__)):
        found = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
        assert found == pytest.approx(rouge(PREDICTIONS, REFERENCES))


def test_references_of_one_dialogue_are_gathered_in_order():
    ids = ["test_0_1", "test_0_2", "test_1_1", "test_1_2"]
    groups = group_references(ids, ["A", "A", "B", "B"], ["a1", "a2", "b1", "b2"])
    assert groups == [("test_0", "A", ["a1", "a2"]), ("test_1", "B", ["b1", "b2"])]


def test_rows_with_plain_ids_stay_on_their_own():
    groups = group_references(["train_0", "train_1", "7"], ["A", "A", "A"], ["x", "y", "z"])
    assert groups == [("train_0", "A", ["x"]), ("train_1", "A", ["y"]), ("7", "A", ["z"])]
    assert group_references(["5", "5"], ["A", "A"], ["x", "y"]) == [("5", "A", ["x", "y"])]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rouge([], []), "no predictions"),
        (lambda: rouge(["a"], []), "1 predictions but 0 lists"),
        (lambda: rouge(["a"], [[]]), "example 0 must have a list of one or more references"),
        (lambda: rouge(["a"], ["a"]), "example 0 must have a list"),
        (
            lambda: rouge(["a", "b"], [["a"], ["b", "c"]], require_equal_references=True),
            r"same number .* got \[1, 2\]",
        ),
        (lambda: group_references(["a"], ["A"], []), "1 ids, 1 dialogues and 0 summaries"),
        (lambda: rouge(["a"], [["a"]], "best"), "aggregate must be one of max, mean, min"),
        (
            lambda: group_references(["t_0_1", "t_0_2", "t_1_1"], ["A", "A", "B"], ["x", "y", "z"]),
            "dialogue t_1_1 has 1 references, but t_0 has 2",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(BlobError, match=message):
        call()
