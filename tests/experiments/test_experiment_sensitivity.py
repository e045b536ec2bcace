"""Experiment II on the demo made small: the pattern of the published table, and what explains it."""

import json
import sys

import pandas as pd
import pytest
from helpers.running import run_experiment

from blob_hf.cli.artifacts import VERDICT_FILE
from blob_hf.experiments.sensitivity import PUBLISHED

VERDICT = {
    "schedule": "geometric", "cycle_steps": 50, "steps": 100, "total_weight": 2.0, "exposure": 1.2,
    "std_by_kl_alone": 5.0, "mean_kl_loss": 12.345, "mean_elbo": 4100.5, "num_weights": 1000, "kl_start": 4200.0,
    "kl_end": 2100.0, "prior_std": 0.2, "std_start": 0.002, "std_end": 0.03, "share_moved": 0.987, "std_to_mean": 0.4,
    "sample_gap": 0.01, "verdict": "healthy", "reason": "",
}  # fmt: skip


def finished_run(folder, gamma):
    folder.mkdir(parents=True)
    applied = gamma > 4
    verdict = VERDICT if applied else VERDICT | {"verdict": "not applied", "cycle_steps": 10290, "total_weight": 0.0}
    (folder / VERDICT_FILE).write_text(json.dumps(verdict))
    scores = {"rouge1": 0.41, "rouge2": 0.21, "rougeL": 0.31, "nll": 3.0, "mean_nll": 3.1, "sample_nll": 3.2}
    found = {f"predict_{name}": value for name, value in scores.items()} | {"predict_num_samples": 10}
    (folder / "predict_results.json").write_text(json.dumps(found))
    rows = [[t, 3.0, 4200.0 - t, 0.01 * applied, 42.0, 4203.0, 0.002, 1.0] for t in range(1, 101)]
    columns = ["step", "nll", "kl", "kl_weight", "kl_loss", "elbo", "posterior_std", "lr_scale"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "kl_history.csv", index=False)
    (folder / "report.md").write_text("done")


def test_the_report_has_the_published_table_and_the_columns_that_explain_it(tmp_path, capsys):
    for beta in (0.1, 0.2):
        for gamma in (4, 8):
            finished_run(tmp_path / "runs" / f"beta{beta:g}-gamma{gamma:g}", gamma)
    assert run_experiment("sensitivity", "--beta", 0.1, 0.2, "--gamma", 4, 8, "--output_dir", tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out and "--max_steps 1500" in text
    assert (
        "| 0.2 | 8 | healthy | 50 | 2.00 | 2 | 1.2 | 4200 | 2100 | 4.20 -> 2.10 | 99 % | 0.150 |" in text
        and "| 0.1 | 4 | not applied | 10290 | 0.01 | 0 |" in text
    )
    assert "| 0.2 | 8 | 12.35 (2205.69) | 4100.50 (577324.49) | 0.4100 (0.4371) | 0.2100 (0.1694) |" in text
    assert "| 3.1000 | 3.0000 | 3.2000 |" in text and "test, 10 posterior samples" in text
    assert (tmp_path / "plots" / "trajectories.png").stat().st_size > 0 and len(
        pd.read_csv(tmp_path / "results.csv")
    ) == 4


def test_the_published_gamma_4_has_no_kl_loss():
    assert len(PUBLISHED) == 9 and all((row[0] == 0) == (gamma == 4) for (_, gamma), row in PUBLISHED.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "0.1", "0.1"], "--beta must be different values"),
        (["--gamma", "x"], "invalid float value"),
        (["--method", "lora"], "--method is set by the experiment"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_experiment("sensitivity", *arguments) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_published_pattern_on_the_demo(tmp_path, capsys):
    """M beyond and well below the number of steps: no KL loss at the small gamma."""
    quick = ["--demo", "--max_steps", 80, "--eval_samples", 2, "--max_predict_samples", 4, "--max_eval_samples", 4]
    quick += ["--max_new_tokens", 8, "--use_cpu", "true", "--compare_base", "false", "--save_strategy", "no"]
    options = ["--beta", 0.2, "--gamma", 4, 12, "--output_dir", tmp_path, "--launcher", sys.executable]
    assert run_experiment("sensitivity", *options, *quick) == 0
    table = pd.read_csv(tmp_path / "results.csv").set_index("gamma")
    assert table.loc[4, "cycle"] > 80 * 5 and table.loc[12, "cycle"] < 80 / 2
    assert table.loc[4, "verdict"] == "not applied" and table.loc[12, "verdict"] == "healthy"
    assert table.loc[4, "mean_kl_loss"] < 1e-3 < 1 < table.loc[12, "mean_kl_loss"]
    assert table.loc[4, "mean_elbo"] > table.loc[12, "mean_elbo"]  # the KL stays where it began
    assert table.loc[12, "kl_end_per_weight"] < table.loc[4, "kl_end_per_weight"]
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/report.md")}
    assert run_experiment("sensitivity", *options, *quick) == 0  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/report.md")} == before
