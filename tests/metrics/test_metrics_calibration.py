import evaluate
import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torchmetrics.classification import MulticlassCalibrationError

from blob_hf.metrics import Calibration, accuracy, brier, calibration, calibration_metrics, ece, nll, reliability_bins
from blob_hf.utils.errors import BlobError

CERTAIN = np.log(np.array([[1.0, 1e-300], [1e-300, 1.0]]))


def random_set(examples=500, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return log_softmax(3 * rng.normal(size=(examples, classes)), axis=1), rng.integers(0, classes, examples)


def brute_force_ece(log_probs, labels, num_bins=15):
    """Every example by hand into its bin [k/n, (k+1)/n), the last one closed."""
    bins = [[] for _ in range(num_bins)]
    for row, label in zip(np.exp(log_probs), labels, strict=True):
        confidence = max(row)
        bins[min(int(confidence * num_bins + 1e-12), num_bins - 1)].append((confidence, np.argmax(row) == label))
    total = 0.0
    for members in bins:
        if members:
            confidence, correct = np.mean(members, axis=0)
            total += len(members) / len(labels) * abs(confidence - correct)
    return total


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_against_sklearn_torchmetrics_and_loops(classes):
    log_probs, labels = random_set(classes=classes)
    probs = np.exp(log_probs)
    assert accuracy(log_probs, labels) == accuracy_score(labels, probs.argmax(1))
    assert nll(log_probs, labels) == pytest.approx(log_loss(labels, probs, labels=range(classes)))
    loop = np.mean([sum((p[c] - (c == y)) ** 2 for c in range(classes)) for p, y in zip(probs, labels, strict=True)])
    assert brier(log_probs, labels) == pytest.approx(loop)
    assert ece(log_probs, labels) == pytest.approx(brute_force_ece(log_probs, labels))
    module = MulticlassCalibrationError(classes, n_bins=15)
    assert ece(log_probs, labels) == pytest.approx(module(torch.tensor(probs), torch.tensor(labels)).item(), abs=1e-6)


def test_binary_brier_is_twice_sklearns():
    log_probs, labels = random_set(classes=2)
    assert brier(log_probs, labels) == pytest.approx(2 * brier_score_loss(labels, np.exp(log_probs[:, 1])))


@pytest.mark.parametrize(
    ("log_probs", "labels"),
    [
        (np.log([[0.9, 0.1]] * 50), [0] * 30 + [1] * 20),  # one class predicted
        (np.log([[0.5, 0.5]] * 4), [0, 1, 1, 1]),  # ties
        (CERTAIN, [0, 1]),
        (CERTAIN, [1, 1]),
        (np.log([[0.6, 0.4], [0.8, 0.2], [1 / 3, 2 / 3]]), [0, 1, 1]),  # confidences on bin edges
        (np.log([[0.7, 0.3]]), [1]),  # one example
    ],
)
def test_degenerate_sets(log_probs, labels):
    assert ece(log_probs, labels) == pytest.approx(brute_force_ece(log_probs, labels), abs=1e-6)
    assert accuracy(log_probs, labels) == accuracy_score(labels, log_probs.argmax(1))
    bins = reliability_bins(log_probs, labels)
    assert bins.count.sum() == len(labels)


def test_zero_probability_of_a_label_is_an_infinite_nll():
    with np.errstate(divide="ignore"):
        sure = np.log(np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert nll(sure, [0, 1]) == np.inf
    assert (nll(sure, [0, 0]), ece(sure, [0, 0]), brier(sure, [0, 1])) == (0, pytest.approx(0, abs=1e-6), 1.0)


def test_confidence_one_shares_the_last_bin():
    log_probs = np.log(np.array([[1.0, 1e-300], [0.95, 0.05]]))
    # one bin: |accuracy 0.5 - confidence 0.975|; torchmetrics alone makes two bins of it, (1 + 0.05) / 2 = 0.525
    assert ece(log_probs, [1, 0]) == pytest.approx(0.475)


def test_a_confidence_on_an_edge_belongs_to_the_upper_bin():
    assert reliability_bins(np.log([[0.5, 0.5]]), [0], num_bins=2).count.tolist() == [0, 1]


@pytest.mark.parametrize("scale", [1, 4, 20])  # 20: most confidences are 1 in float32
def test_reliability_bins_add_up_to_the_ece(scale):
    log_probs, labels = random_set()
    log_probs = log_softmax(scale * log_probs, axis=1)
    bins = reliability_bins(log_probs, labels)
    filled = bins.count > 0
    gaps = np.abs(bins.accuracy - bins.confidence)[filled]
    assert (bins.count[filled] / len(labels) * gaps).sum() == pytest.approx(ece(log_probs, labels), abs=1e-6)


def test_fewer_than_one_bin_and_labels_that_are_no_ids():
    log_probs, labels = random_set()
    for function in (ece, reliability_bins):
        with pytest.raises(BlobError, match="num_bins must be >= 1, got 0"):
            function(log_probs, labels, 0)
    with pytest.raises(BlobError, match="integer class ids, got dtype float64"):
        accuracy(log_probs, labels + 0.5)


def test_float32_tensors_and_lists_are_taken():
    log_probs, labels = random_set()
    single = torch.tensor(log_probs, dtype=torch.float32)
    expected = calibration_metrics(log_probs, labels)
    assert calibration_metrics(single, torch.tensor(labels)) == pytest.approx(expected, rel=1e-5)
    assert calibration_metrics(log_probs.tolist(), labels.tolist()) == expected


def test_is_an_evaluate_metric_without_network():
    log_probs, labels = random_set()
    expected = calibration_metrics(log_probs, labels)
    for metric in (Calibration(), evaluate.load(calibration.__file__)):
        assert metric.compute(predictions=log_probs, references=labels) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("log_probs", "labels", "message"),
    [
        (np.log([[0.5, 0.5]]), [2], "label 2 is outside the range of 2 classes"),
        (np.log([[0.5, 0.5]]), [-1], "label -1 is outside"),
        (np.array([[1.0, 2.0]]), [0], "apply log_softmax"),
        (np.array([[np.nan, 0.0]]), [0], "some are NaN"),
        (np.zeros((0, 2)), [], "no examples"),
        (np.zeros(3), [0, 0, 0], "expected log_probs"),
        (np.log([[0.5, 0.5]]), [0, 1], "expected log_probs"),
    ],
)
def test_bad_input(log_probs, labels, message):
    with pytest.raises(BlobError, match=message):
        calibration_metrics(log_probs, np.array(labels, dtype=int))
