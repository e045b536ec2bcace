"""BLoB beside plain LoRA: the numbers, what is abstained from, and that the rival is plain LoRA itself."""

import json

import numpy as np
import pytest
from helpers.running import GLUE, run_script
from scipy.special import log_softmax

from blob_hf.cli.comparison import ANSWERED, abstentions, comparison_table
from blob_hf.metrics import calibration_metrics

QUICK = [
    "--demo", "--max_eval_samples", "40", "--disable_tqdm", "true", "--use_cpu", "true", "--eval_samples", "2",
    "--max_steps", "6",
]  # fmt: skip


def scores(seed, count=50):
    return log_softmax(np.random.default_rng(seed).normal(size=(count, 3)), axis=1)


def test_the_table_is_the_metrics_of_both_and_the_accuracy_of_the_surest():
    labels = np.random.default_rng(9).integers(0, 3, 50)
    table = comparison_table(scores(0), scores(1), labels, "ours")
    for column, values in (("ours", scores(0)), ("LoRA", scores(1))):
        for name, value in calibration_metrics(values, labels).items():
            assert table.loc[name, column] == pytest.approx(value)
        entropy = -(np.exp(values) * values).sum(1)
        kept = np.argsort(entropy)[: int(ANSWERED * 50)]
        assert table.iloc[-1][column] == pytest.approx((values.argmax(1) == labels)[kept].mean())


def test_the_least_certain_texts_come_first_and_once():
    ours = np.log([[0.9, 0.1], [0.5, 0.5], [0.6, 0.4], [0.5, 0.5]])
    rival = np.log([[0.9, 0.1], [0.01, 0.99], [0.02, 0.98], [0.01, 0.99]])
    text = abstentions(ours, rival, np.array([0, 1, 0, 1]), ["clear", "open", "vague", "open"], ["no", "yes"])
    shown = text.splitlines()[2:]
    assert [line.rsplit(": ", 1)[1] for line in shown] == ["open", "vague", "clear"]
    assert "BLoB no 0.60, LoRA yes 0.98, truth no: vague" in shown[1]


@pytest.mark.slow
def test_the_rival_is_what_method_lora_trains(monkeypatch, tmp_path, capsys):
    assert run_script(monkeypatch, GLUE, *QUICK, "--output_dir", tmp_path / "blob") == 0
    printed = capsys.readouterr().out
    assert "against plain LoRA, all else equal" in printed and "would abstain from first" in printed
    assert "## Examples" in (tmp_path / "blob" / "report.md").read_text()
    assert run_script(monkeypatch, GLUE, *QUICK, "--method", "lora", "--output_dir", tmp_path / "lora") == 0
    rival = json.loads((tmp_path / "blob" / "lora_results.json").read_text())
    alone = json.loads((tmp_path / "lora" / "eval_results.json").read_text())
    # the head is drawn anew for it from the same seed
    assert rival["lora_mean_nll"] == pytest.approx(alone["eval_mean_nll"], rel=1e-4)
