"""Per-class metrics, against their definitions counted by hand and scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import classification_report, f1_score

from blob_hf.metrics.classification import class_report, classification_metrics, macro_f1
from blob_hf.reporting.class_tables import class_section


def random_predictions(classes, examples=200, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, size=examples, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))
    logits = rng.normal(size=(examples, classes)) + 2 * np.eye(classes)[labels]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True)), labels


def test_against_counts_and_scikit_learn():
    scores, labels = random_predictions(4)
    predicted = scores.argmax(1)
    report = class_report(scores, labels, ["a", "b", "c", "d"])
    for c, name in enumerate("abcd"):
        hits = sum((p == c) and (t == c) for p, t in zip(predicted, labels, strict=True))
        precision, recall = hits / (predicted == c).sum(), hits / (labels == c).sum()
        found = report.table.loc[name]
        assert found["precision"] == pytest.approx(precision) and found["recall"] == pytest.approx(recall)
        assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
        assert found["support"] == (labels == c).sum()
        for d in range(4):
            assert report.confusion[c, d] == sum((t == c) and (p == d) for p, t in zip(predicted, labels, strict=True))
    theirs = classification_report(labels, predicted, output_dict=True)
    assert macro_f1(scores, labels) == pytest.approx(theirs["macro avg"]["f1-score"])
    metrics = classification_metrics(scores, scores[:, None], scores, labels)
    assert metrics["macro_f1"] == metrics["mean_macro_f1"] == pytest.approx(report.table["f1"].mean())
    assert metrics["macro_f1_sample_std"] == 0


def test_classes_that_do_not_occur():
    scores = np.log(np.array([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1]]))
    labels = np.array([0, 1])
    assert macro_f1(scores, labels) == pytest.approx(f1_score([0, 1], [0, 0], average="macro"))
    table = class_report(scores, labels, ["a", "b", "c"]).table
    assert table.loc["c"].tolist() == [0, 0, 0, 0] and table.loc["b", "recall"] == 0


def test_the_section_of_the_report_has_all_classes_or_the_worst_of_many():
    scores, labels = random_predictions(3)
    report = class_report(scores, labels, ["a|b", "no", "yes"])
    section = class_section("Classes", report.table, report.confusion)
    row = report.table.iloc[1]
    assert f"| no | {row.precision:.4f} | {row.recall:.4f} | {row.f1:.4f} | {int(row.support)} |" in section
    assert "| yes | " + " | ".join(map(str, report.confusion[2])) + " |" in section and "a\\|b" in section
    scores, labels = random_predictions(30, 600)
    names = [f"class {i}" for i in range(30)]
    report = class_report(scores, labels, names)
    section = class_section("Classes", report.table, report.confusion)
    seen = report.table[report.table["support"] > 0]
    shown = [name for name in names if f"| {name} | {report.table.loc[name, 'precision']:.4f}" in section]
    assert len(shown) == 10 and seen.loc[shown, "f1"].max() <= seen.drop(shown)["f1"].min()
    wrong = report.confusion.copy()
    np.fill_diagonal(wrong, 0)
    true, predicted = divmod(int(wrong.argmax()), 30)
    share = wrong.max() / report.confusion[true].sum()
    assert f"| {names[true]} | {names[predicted]} | {wrong.max()} | {share:.0%} |" in section
