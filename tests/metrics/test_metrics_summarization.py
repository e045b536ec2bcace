import evaluate
import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from blob_hf.metrics import MultiReferenceRouge, rouge, rouge_per_example, summarization
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
        (lambda: rouge(["a"], [["a"]], "best"), "aggregate must be one of max, mean, min"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(BlobError, match=message):
        call()
