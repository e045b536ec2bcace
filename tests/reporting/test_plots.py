import matplotlib.colors
import matplotlib.image
import matplotlib.style
import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax
from scipy.stats import gaussian_kde

from blob_hf.metrics import confidence, ece, reliability_bins
from blob_hf.metrics.samples import NLLCurve
from blob_hf.metrics.selective import risk_coverage
from blob_hf.reporting.classification_plots import (
    plot_confidence,
    plot_nll_curve,
    plot_rejection,
    plot_reliability,
    plot_shift,
)
from blob_hf.reporting.generation_plots import plot_curves, plot_densities, plot_risk_coverage
from blob_hf.reporting.kl_plots import plot_kl, plot_posterior_std, plot_trajectories
from blob_hf.trainer.kl.history import COLUMNS
from blob_hf.trainer.kl.schedule import KLSchedule
from blob_hf.tuner.posterior import LayerStatistics
from blob_hf.utils.errors import BlobError


def history(weights):
    steps = np.arange(1, len(weights) + 1)
    kl = 1e5 / steps
    columns = (steps, 1 / steps, kl, weights, weights * kl, kl, np.full(len(steps), 0.01), np.ones(len(steps)))
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_kl_plot_shows_the_history_of_the_csv(tmp_path):
    schedule = KLSchedule("geometric", cycle_steps=20)
    table = history(np.array([schedule(step) for step in range(1, 61)]))
    table.to_csv(tmp_path / "kl_history.csv", index=False)
    figure = plot_kl(tmp_path / "kl_history.csv", tmp_path / "kl.png")
    assert is_png(tmp_path / "kl.png")
    kl, weight, std = (axis.lines[0].get_ydata() for axis in figure.axes)
    np.testing.assert_allclose(kl, table["kl"])
    np.testing.assert_allclose(weight, table["kl_weight"])
    np.testing.assert_allclose(std, table["posterior_std"])
    assert all(axis.get_ylabel() for axis in figure.axes) and figure.axes[-1].get_xlabel()


def test_kl_plot_says_when_the_kl_was_never_applied(tmp_path):
    figure = plot_kl(history(np.zeros(30)), tmp_path / "kl.png")
    assert "not applied" in figure.axes[1].texts[0].get_text() and not figure.axes[1].lines


def test_kl_plot_of_one_step(tmp_path):
    plot_kl(history(np.array([0.5])), tmp_path / "kl.png")
    assert is_png(tmp_path / "kl.png")


def test_kl_plot_names_missing_columns(tmp_path):
    with pytest.raises(BlobError, match="lacks kl_weight"):
        plot_kl(history(np.zeros(3)).drop(columns="kl_weight"), tmp_path / "kl.png")


def test_plots_ignore_a_dark_style_and_leave_it_as_it_was(tmp_path):
    with matplotlib.style.context("dark_background"):
        matplotlib.rcParams["savefig.facecolor"] = "black"
        before = dict(matplotlib.rcParams)
        figure = plot_reliability({"N=0": reliability_bins(np.log([[0.9, 0.1]]), [0])}, tmp_path / "reliability.png")
        assert dict(matplotlib.rcParams) == before
    corner = matplotlib.image.imread(tmp_path / "reliability.png")[0, 0]
    assert corner.tolist() == [1, 1, 1, 1]  # opaque white, though the user saves on black
    assert sum(matplotlib.colors.to_rgb(figure.axes[0].title.get_color())) < 1


def test_reliability_plot_needs_a_panel(tmp_path):
    with pytest.raises(BlobError, match="no predictions"):
        plot_reliability({}, tmp_path / "reliability.png")
    with pytest.raises(BlobError, match="no predictions"):
        plot_confidence({}, tmp_path / "confidence.png")


@pytest.mark.parametrize("scale", [0.01, 3, 60])
def test_reliability_plot_shows_the_bins(tmp_path, scale):
    rng = np.random.default_rng(0)
    scores = {name: log_softmax(scale * rng.normal(size=(200, 3)), axis=1) for name in ("N=0", "N=10")}
    labels = rng.integers(0, 3, 200)
    panels = {name: reliability_bins(log_probs, labels) for name, log_probs in scores.items()}
    figure = plot_reliability(panels, tmp_path / "reliability.png")
    assert is_png(tmp_path / "reliability.png")
    for axis, log_probs in zip(figure.axes[:2], scores.values(), strict=True):
        bins = reliability_bins(log_probs, labels)
        heights = [bar.get_height() for bar in axis.patches]
        np.testing.assert_allclose(heights, bins.accuracy[bins.count > 0])
        assert f"ECE = {100 * ece(log_probs, labels):.1f} %" in axis.get_title()
    counts = [sum(bar.get_height() for bar in axis.patches) for axis in figure.axes[2:]]
    assert counts == [200, 200]


def test_plots_of_generated_texts(tmp_path):
    rng = np.random.default_rng(0)
    arms = ["blob-mean-greedy", "blob-sample-greedy", "lora-sampling"]
    table = pd.DataFrame({"arm": np.repeat(arms, 20), "rouge1_max": rng.random(60), "rougeL_max": rng.random(60)})
    table.loc[table["arm"] == arms[0], "rouge1_max"] = 0.5  # no spread, no density
    figure = plot_densities(table, {"rouge1_max": "ROUGE-1", "rougeL_max": "ROUGE-L"}, "note", tmp_path / "d.png")
    assert is_png(tmp_path / "d.png") and [axis.get_xlabel() for axis in figure.axes] == ["ROUGE-1", "ROUGE-L"]
    # a density (but for the arm without spread) and the mean of each arm
    assert [len(axis.lines) for axis in figure.axes] == [5, 6]
    grid, density = figure.axes[1].lines[0].get_data()
    values = table.loc[table["arm"] == arms[0], "rougeL_max"]
    np.testing.assert_allclose(density, gaussian_kde(values)(grid), rtol=1e-6)
    curves = pd.DataFrame(
        [
            {"arm": arm, "kind": kind, "samples": n, "value": n / 10}
            for arm in arms
            for kind in ("best", "mbr")
            for n in (1, 2)
        ]
    )
    figure = plot_curves(curves, "ROUGE-L", tmp_path / "c.png")
    assert is_png(tmp_path / "c.png") and all(len(axis.lines) == 3 for axis in figure.axes)
    risk = rng.random(30)
    shown = {"entropy": risk_coverage(rng.random(30), risk), "oracle": risk_coverage(risk, risk)}
    figure = plot_risk_coverage(shown, "1 - ROUGE-L", tmp_path / "r.png")
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), np.cumsum(np.sort(risk)) / np.arange(1, 31))
    with pytest.raises(BlobError, match="no scores"):
        plot_densities(table[:0], {"rouge1_max": "ROUGE-1"}, "note", tmp_path / "e.png")


def test_confidence_plot_counts_right_and_wrong(tmp_path):
    rng = np.random.default_rng(0)
    log_probs, labels = log_softmax(3 * rng.normal(size=(200, 3)), axis=1), rng.integers(0, 3, 200)
    figure = plot_confidence(dict.fromkeys(("N=0", "N=10"), confidence(log_probs, labels)), tmp_path / "confidence.png")
    assert is_png(tmp_path / "confidence.png")
    right, wrong = (container for container in figure.axes[0].containers)
    correct = (log_probs.argmax(1) == labels).sum()
    assert sum(bar.get_height() for bar in right) == correct
    assert sum(bar.get_height() for bar in wrong) == 200 - correct
    sure, accuracy = (line.get_xdata()[0] for line in figure.axes[0].lines)
    assert sure == pytest.approx(np.exp(log_probs.max(1)).mean()) and accuracy == pytest.approx(correct / 200)


def test_rejection_plot_is_the_accuracy_of_what_remains(tmp_path):
    rng = np.random.default_rng(0)
    wrong, uncertainty = (rng.random(50) < 0.3).astype(float), rng.random(50)
    curves = {"entropy": risk_coverage(uncertainty, wrong), "oracle": risk_coverage(wrong, wrong)}
    figure = plot_rejection(curves, tmp_path / "rejection.png")
    rejected, accuracy = figure.axes[0].lines[0].get_data()
    kept = np.argsort(uncertainty)
    np.testing.assert_allclose(accuracy, [1 - wrong[kept[:n]].mean() for n in range(1, 51)])
    np.testing.assert_allclose(rejected, 1 - np.arange(1, 51) / 50)
    assert f"area {accuracy.mean():.3f}" in figure.legends[0].get_texts()[0].get_text()


def test_nll_curve_and_shift_plots_show_their_numbers(tmp_path):
    curve = NLLCurve(np.array([1, 2, 3]), np.array([0.7, 0.601, 0.6]), np.array([0.01, 0.005, 0.0]))
    figure = plot_nll_curve(curve, 0.65, tmp_path / "curve.png")
    assert figure.axes[0].lines[0].get_ydata().tolist() == curve.nll.tolist()
    assert figure.axes[0].lines[1].get_ydata()[0] == 0.65 and figure.axes[0].lines[2].get_xdata()[0] == 2
    rng = np.random.default_rng(0)
    figure = plot_shift({"N=0": rng.random(30)}, {"N=0": rng.random(20)}, ("own", "other"), tmp_path / "shift.png")
    heights = [sum(bar.get_height() for bar in container) for container in figure.axes[0].containers]
    assert heights == pytest.approx([1, 1]) and is_png(tmp_path / "shift.png") and is_png(tmp_path / "curve.png")


def test_std_map_has_a_cell_for_each_layer(tmp_path):
    names = [f"bert.encoder.layer.{i}.attention.self.{kind}" for i in range(3) for kind in ("query", "value")]
    layers = {name: LayerStatistics(8, 0.01 * (i + 1), 0, 1, 1, 1) for i, name in enumerate([*names, "classifier"])}
    figure = plot_posterior_std(layers, 0.2, tmp_path / "std.png")
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["self.query", "self.value", "classifier"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1", "2", "-"]
    shown = sorted(float(text.get_text()) for text in axis.texts)
    assert shown == pytest.approx([0.05 * (i + 1) for i in range(7)])
    ends = zip(("encoder", "decoder"), (names[0], names[-1]), strict=True)
    halves = {f"model.{half}.layers.0.self_attn.q_proj": layers[name] for half, name in ends}
    axis = plot_posterior_std(halves, 0.2, tmp_path / "bart.png").axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["encoder 0", "decoder 0"]


def test_a_map_of_equal_cells_is_a_sentence(tmp_path):
    layers = {f"layer.{i}.query": LayerStatistics(8, 0.1 + 0.001 * i, 0, 1, 1, 1) for i in range(5)}
    figure = plot_posterior_std(layers, 0.2, tmp_path / "std.png")
    assert not figure.axes and is_png(tmp_path / "std.png")
    said = figure.texts[0].get_text()
    assert "All 5 layers have nearly the same" in said and "0.500 to 0.520" in said


def test_no_legend_is_cut_off(tmp_path):
    wrong = np.array([0.0, 1.0, 0.0, 0.0])
    names = ("posterior mean, max. probability", "samples, max. probability", "samples, mutual information", "oracle")
    figure = plot_rejection({name: risk_coverage(wrong, wrong) for name in names}, tmp_path / "rejection.png")
    box = figure.legends[0].get_window_extent()
    assert (
        box.x0 >= 0
        and box.x1 <= figure.bbox.width
        and figure.legends[0].get_texts()[3].get_text()[:13] == "best possible"
    )


def test_noise_does_not_fill_an_axis(tmp_path):
    curve = NLLCurve(np.array([1, 2]), np.array([2.0003, 2.0]), np.zeros(2))
    low, high = plot_nll_curve(curve, 2.0001, tmp_path / "curve.png", "token").axes[0].get_ylim()
    assert high - low == pytest.approx(0.05 * 2.0001) and low < 2 < high
    curve = NLLCurve(np.array([1, 2]), np.array([0.9, 0.6]), np.zeros(2))
    low, high = plot_nll_curve(curve, 0.7, tmp_path / "curve.png").axes[0].get_ylim()
    assert high - low < 0.35  # as it is where there is something to see


def test_trajectories_of_a_grid(tmp_path):
    runs = {name: history(np.full(20, weight)) for name, weight in (("small", 0.0), ("large", 0.1))}
    figure = plot_trajectories(runs, tmp_path / "grid.png", {"small": {"linestyle": "--"}})
    kl, weight, total, elbo = figure.axes
    np.testing.assert_allclose(kl.lines[1].get_ydata(), runs["large"]["kl"])
    assert weight.lines[0].get_ydata().max() == 1e-12  # never applied: at the bottom of the log axis
    assert total.lines[1].get_ydata()[-1] == pytest.approx(2.0) and elbo.lines[0].get_linestyle() == "--"
    with pytest.raises(BlobError, match="no runs"):
        plot_trajectories({}, tmp_path / "none.png")
