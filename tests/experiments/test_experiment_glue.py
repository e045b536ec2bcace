"""Experiment I: its report on runs whose numbers are known, and its grid of commands."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
from helpers.running import run_experiment
from scipy import stats
from scipy.special import log_softmax

from blob_hf.experiments import glue_report, grid
from blob_hf.experiments.glue import method_arguments
from blob_hf.experiments.grid import GridArguments, GridRun, complete_runs
from blob_hf.experiments.published import MULTIPLE_CHOICE
from blob_hf.experiments.statistics import paired_interval, spread
from blob_hf.metrics import calibration_metrics
from blob_hf.trainer.kl.history import COLUMNS
from blob_hf.utils.errors import BlobError

SEEDS = (1, 2, 3)


def finished_run(folder, method, seed):
    """A folder as run_glue_blob.py leaves it, with made-up predictions."""
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(0).integers(0, 2, 60)
    mean, samples = (log_softmax(2 * rng.normal(size=(60, 2)), axis=1) for _ in range(2))
    if method == "lora":
        samples = mean
    folder.mkdir(parents=True)
    found = {"eval_num_samples": 0 if method == "lora" else 10}
    for prefix, scores in (("eval_", samples), ("eval_mean_", mean)):
        found |= {prefix + name: value for name, value in calibration_metrics(scores, labels).items()}
        found[f"{prefix}rejection_area"] = 0.8
    (folder / "eval_results.json").write_text(json.dumps(found))
    rows = zip(samples.tolist(), mean.tolist(), labels.tolist(), strict=True)
    lines = [json.dumps(dict(zip(("log_probs", "mean_log_probs", "label"), row, strict=True))) for row in rows]
    (folder / "validation_predictions.jsonl").write_text("\n".join(lines) + "\n")
    if method != "lora":
        verdict = {
            "verdict": "healthy", "num_weights": 100, "prior_std": 0.2, "cycle_steps": 53, "total_weight": 4.7,
            "kl_start": 420.0, "kl_end": 210.0, "std_start": 0.002, "std_end": 0.02, "sample_gap": 0.0123,
        }  # fmt: skip
        (folder / "kl_verdict.json").write_text(json.dumps(verdict))
        pd.DataFrame([[t, *[1.0] * 7] for t in (1, 2)], columns=COLUMNS).to_csv(folder / "kl_history.csv", index=False)
        ood = {"ood_wic_mean_entropy_auroc": 0.6, "ood_wic_entropy_auroc": 0.6 + 0.01 * seed}
        ood |= {f"ood_wic_{name}": 0.5 for name in ("mutual_information_auroc", "entropy_aupr", "entropy_fpr95")}
        (folder / "ood_wic_results.json").write_text(json.dumps(ood))
    (folder / "report.md").write_text("done")


@pytest.fixture
def runs(tmp_path):
    keys = [(task, method, seed) for task in ("mrpc", "rte") for method in ("blob", "lora") for seed in SEEDS]
    folders = {key: tmp_path.joinpath(*map(str, key)) for key in keys}
    for (_, method, seed), folder in folders.items():
        finished_run(folder, method, seed)
    return folders


def cells(text, start):
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def values_of(runs, key, name):
    return [json.loads((runs[*key, s] / "eval_results.json").read_text())[name] for s in SEEDS]


def test_the_table_is_numpys_mean_and_std_over_seeds(tmp_path, runs, capsys):
    glue_report.write(tmp_path, runs, ["--max_steps", "250"])
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out and "--max_steps 250" in text
    for start, method, prefix in (
        ("| mrpc | blob, N=0 ", "blob", "eval_mean_"),
        ("| mrpc | blob, N=10 ", "blob", "eval_"),
        ("| rte | lora, N=0 ", "lora", "eval_mean_"),
    ):
        task = start.split()[1]
        for cell, name in zip(cells(text, start)[3:], glue_report.SHOWN, strict=True):
            values = values_of(runs, (task, method), prefix + name)
            scale, digits = (100, 2) if name in ("accuracy", "ece") else (1, 3)
            assert cell == f"{scale * np.mean(values):.{digits}f} +- {scale * np.std(values, ddof=1):.{digits}f}"
    assert "| lora, N=10" not in text
    assert len(pd.read_csv(tmp_path / "results.csv")) == 2 * 3 * (2 + 1)


def test_published_rows_say_how_far_we_are(tmp_path, runs):
    glue_report.write(tmp_path, runs, [])
    text = (tmp_path / "report.md").read_text()
    for source, mean, std in (("K", 87.66, 1.44), ("W", 88.73, 0.35)):
        shown = cells(text, f"| mrpc | published blob, N=10 [{source}]")
        values = 100 * np.array(values_of(runs, ("mrpc", "blob"), "eval_accuracy"))
        away = (values.mean() - mean) / np.sqrt(values.var(ddof=1) + std**2)
        assert shown[3] == f"{mean:.2f} +- {std:.2f} ({away:+.1f} std)" and shown[6] == "-"


def test_differences_are_paired_by_seed(tmp_path, runs):
    glue_report.write(tmp_path, runs, [])
    found = cells((tmp_path / "report.md").read_text(), "| rte | blob - lora")
    first, second = (values_of(runs, ("rte", method), "eval_nll") for method in ("blob", "lora"))
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    shown = f"{np.mean(first) - np.mean(second):+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
    assert found[5].startswith(shown)


def test_the_report_has_verdicts_detection_and_plots(tmp_path, runs):
    glue_report.write(tmp_path, runs, [])
    text = (tmp_path / "report.md").read_text()
    assert cells(text, "| mrpc | blob | 2 ") == [
        "mrpc", "blob", "2", "healthy", "53", "4.70", "4.20 -> 2.10", "0.010 -> 0.100", "1.23",
    ]  # fmt: skip
    assert "| mrpc | wic | blob | 3 | 0.600 +- 0.000 | 0.620 +- 0.010 | 0.500" in text
    for name in ("methods", "reliability_mrpc", "accuracy_rejection_rte", "kl_mrpc"):
        assert f"plots/{name}.png" in text and (tmp_path / "plots" / f"{name}.png").stat().st_size > 0


def test_a_report_without_a_seed_that_all_methods_have(tmp_path, runs):
    """Some runs failed: the tables have the others, and pooled plots, which need the same inputs, are left out."""
    kept = {("mrpc", "blob", 1), ("mrpc", "lora", 2), ("rte", "blob", 2), ("rte", "lora", 2)}
    glue_report.write(tmp_path, {key: folder for key, folder in runs.items() if key in kept}, [])
    text = (tmp_path / "report.md").read_text()
    assert cells(text, "| mrpc | blob, N=10 ")[2] == "1" and "| mrpc | blob - lora" not in text
    assert "reliability_mrpc" not in text and "reliability_rte" in text
    assert "kl_mrpc" in text and "kl_rte" in text


def test_one_seed_has_no_std(tmp_path, runs):
    glue_report.write(tmp_path, {key: folder for key, folder in runs.items() if key[2] == 1}, [])
    text = (tmp_path / "report.md").read_text()
    assert "+-" not in cells(text, "| mrpc | blob, N=0 ")[3] and "[-inf, +inf]" in text and "nan" not in text


def test_spread_and_paired_interval():
    values = [0.7, 0.72, 0.77]
    found = spread(values)
    assert (found.mean, found.std) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    assert np.isnan(spread([0.5]).std) and spread([0.5]).show() == "0.50"
    assert np.isnan(spread([0.5]).distance(spread([0.4])))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    interval = paired_interval(values, [0.0, 0.0, 0.0])
    assert (interval.low, interval.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


# ----- the grid ---------------------------------------------------------------------------------------------------

SCRIPT = """
import json, pathlib, sys
arguments = sys.argv[1:]
folder = pathlib.Path(arguments[arguments.index("--output_dir") + 1])
with (folder / "calls").open("a") as file:
    file.write(json.dumps(arguments) + "\\n")
if "--fail" in arguments:
    print("error: it failed on purpose", file=sys.stderr)
    sys.exit(2)
(folder / "eval_results.json").write_text("{}")
(folder / "report.md").write_text("done")
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    monkeypatch.setattr(grid, "script_path", lambda name: str(path))
    return path


def calls(run):
    return [json.loads(line) for line in (run.folder / "calls").read_text().splitlines()]


def test_complete_runs_are_reused_and_failed_ones_are_told(tmp_path, script, caplog):
    runs = [GridRun(name, tmp_path / name, ("--seed", name, *more)) for name, more in (("1", ()), ("2", ("--fail",)))]
    args = GridArguments(launcher=sys.executable, jobs=2)
    assert complete_runs(runs, "any", args) == [runs[1]]
    assert "2 failed with exit code 2: error: it failed on purpose" in caplog.text
    assert complete_runs(runs, "any", args) == [runs[1]]
    assert calls(runs[0]) == [["--seed", "1", "--output_dir", str(tmp_path / "1")]] and len(calls(runs[1])) == 2
    assert (tmp_path / "2" / "run.log").read_text().count("$ ") == 2


def test_runs_that_would_share_a_folder_are_refused(tmp_path):
    runs = [GridRun(name, tmp_path / "same", ()) for name in ("a", "b")]
    with pytest.raises(BlobError, match="two runs of the grid would share a folder"):
        complete_runs(runs, "any", GridArguments())


def test_interrupted_runs_resume_and_launchers_know_the_name(tmp_path, script, monkeypatch):
    run = GridRun("mrpc/blob/seed1", tmp_path / "run", ("--seed", "1"))
    monkeypatch.setattr(grid, "newest_complete", lambda folder: str(folder / "checkpoint-5"))
    found = grid.command(run, "script.py", "srun --job-name {name} accelerate launch")
    assert found[:5] == ["srun", "--job-name", "mrpc-blob-seed1", "accelerate", "launch"]
    assert found[-2:] == ["--resume_from_checkpoint", "true"]
    assert grid.command(run, "script.py", None)[:3] == [sys.executable, "-m", "accelerate.commands.launch"]


def test_the_grid_of_experiment_i(tmp_path, script, capsys, monkeypatch):
    monkeypatch.setattr(glue_report, "write", lambda folder, runs, rest, experiment: print(sorted(runs), rest))
    options = ["--output_dir", tmp_path / "out", "--launcher", sys.executable]
    grid_ = ["--tasks", "rte", "cola", "--seeds", "1", "2", "--methods", "lora", "blob:kl_schedule=elbo,beta=0.1"]
    rest = ["--max_steps", "7", "--train_file", "data/{task}.csv"]
    assert run_experiment("glue", *grid_, *options, *rest) == 0
    assert len(list((tmp_path / "out" / "runs").glob("*/*/*/report.md"))) == 8
    folder = tmp_path / "out" / "runs" / "cola" / "blob-kl-schedule-elbo-beta-0.1" / "seed2"
    (call,) = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    assert call == [
        "--task_name", "cola", "--seed", "2", "--method", "blob", "--kl_schedule", "elbo", "--beta", "0.1",
        "--max_steps", "7", "--train_file", "data/cola.csv", "--output_dir", str(folder),
    ]  # fmt: skip
    assert "'data/{task}.csv'" in capsys.readouterr().out
    assert run_experiment("glue", "--tasks", "rte", *options, *rest, "--fail") == 2
    assert "holds a run of different settings (arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "snli"], "--tasks must be among rte, mrpc, cola, wic, boolq, "),
        (["--seeds", "1", "1"], "--seeds must be different values"),
        (["--methods", "bayes"], "--methods must be among blob, lora"),
        (["--methods", "blob:beta"], "settings of a method are name=value"),
        (["--jobs", "0"], "--jobs must be >= 1, got 0"),
        (["--seed", "3"], "--seed is set by the experiment for each run"),
        (["--method=lora"], "--method is set by the experiment"),
        (["--output_dir", "x", "--launcher", "no-such-program"], "cannot start no-such-program"),
    ],
)
def test_bad_input(tmp_path, script, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_experiment("glue", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_method_arguments():
    assert method_arguments("lora") == ("--method", "lora")
    assert method_arguments("blob:beta=0.1") == ("--method", "blob", "--beta", "0.1")


@pytest.mark.slow
def test_the_experiment_with_the_real_script(tmp_path, capsys):
    """Trains, reports, and the second time only reports."""
    from blob_hf.data import demo

    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("validation", 24)):
        words = rng.choice(["yes", "no"], size=(count, 2))
        rows = [{"sentence1": a, "sentence2": b, "label": int(a == b)} for a, b in words.tolist()]
        (tmp_path / f"rte_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "glue", "--tasks", "rte", "--seeds", 1, 2, "--methods", "blob", "--output_dir", tmp_path / "out", "--jobs", 2,
        "--launcher", sys.executable, "--model_name_or_path", demo.BACKBONE_DIR, "--max_steps", 4, "--use_cpu", "true",
        "--train_file", tmp_path / "{task}_train.jsonl", "--validation_file", tmp_path / "{task}_validation.jsonl",
        "--eval_samples", 3, "--kl_cycle_steps", 2, "--ood_file", f"other={tmp_path}/rte_train.jsonl",
    ]  # fmt: skip
    assert run_experiment(*arguments) == 0
    text = capsys.readouterr().out
    assert "| rte | blob, N=3 | 2 |" in text and "| rte | other | blob | 2 |" in text
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("runs/rte/blob/*/eval_results.json")]
    mean, std = np.mean([one["eval_nll"] for one in found]), np.std([one["eval_nll"] for one in found], ddof=1)
    assert f"{mean:.3f} +- {std:.3f}" in cells(text, "| rte | blob, N=3 ")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*/*/*/report.md")}
    assert run_experiment(*arguments) == 0
    assert capsys.readouterr().out == text and len(before) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*/*/*/report.md")} == before


def test_multiple_choice_is_beside_its_own_published_table(tmp_path):
    folders = {("arc_challenge", "blob", seed): tmp_path / f"run{seed}" for seed in SEEDS}
    for (_, method, seed), folder in folders.items():
        finished_run(folder, method, seed)
    glue_report.write(tmp_path, folders, [], MULTIPLE_CHOICE)
    text = (tmp_path / "report.md").read_text()
    assert cells(text, "| arc_challenge | published BLoB, Llama-2-7B [C]")[3:] == ["66.70", "10.80", "0.880", "-"]
    assert cells(text, "| arc_challenge | published MAP, Llama-2-7B [C]")[3:] == ["67.70", "30.60", "3.070", "-"]
    assert "run_multiple_choice_blob.py" in text and "published blob" not in text
