"""The study: the rows it draws, the grid it runs, what is chosen by what, and its report on runs of known numbers."""

import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers.running import run_experiment
from scipy import stats
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score

from blob_hf import BlobError
from blob_hf.experiments import study, study_report, study_settings
from blob_hf.experiments.grid import GridArguments, GridRun, complete_runs
from blob_hf.experiments.study import Grid, StudyArguments
from blob_hf.experiments.study_settings import SETTINGS, Setting, write_rows

SEEDS = (1, 2, 3)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ----- rows -------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    rows = [{"text": f"{'word ' * (n % 7)}{n}", "label": f"c{n % 5}"} for n in range(400)]
    jsonl(tmp_path / "data" / "train.jsonl", rows)
    jsonl(tmp_path / "data" / "test.jsonl", [{**row, "text": f"test {row['text']}"} for row in rows])
    jsonl(tmp_path / "data" / "ood.jsonl", [{"text": f"else {n}"} for n in range(300)])
    return tmp_path / "data"


OWN = Setting(
    "own", True, "train.jsonl", "test.jsonl", rows=30, held_out=10, steps=40, learning_rate=1e-3, max_words=5,
    columns=("text",), classes=("c0", "c2", "c3"), ood="ood.jsonl",
)  # fmt: skip


def test_every_seed_draws_rows_of_its_own_and_all_share_the_test_rows(tmp_path, data):
    write_rows(OWN, SEEDS, data, tmp_path)
    test = lines(tmp_path / "test.jsonl")
    assert all(row["text"].startswith("test ") and row["label"] in OWN.classes for row in test)
    assert len(lines(tmp_path / "ood.jsonl")) == study_settings.OOD_ROWS
    drawn = {}
    for seed in SEEDS:
        train, held_out = (lines(tmp_path / f"seed{seed}" / f"{name}.jsonl") for name in ("train", "held_out"))
        texts = [row["text"] for row in train + held_out]
        assert len(texts) == len(set(texts)) == 40
        assert pd.Series([row["label"] for row in train]).value_counts().tolist() == [10, 10, 10]
        assert max(len(text.split()) for text in texts) <= 5
        drawn[seed] = set(texts)
    assert drawn[1] != drawn[2] != drawn[3]
    before = (tmp_path / "seed1" / "train.jsonl").read_bytes()
    write_rows(OWN, SEEDS, data, tmp_path)
    assert (tmp_path / "seed1" / "train.jsonl").read_bytes() == before


def test_where_the_test_split_is_short_training_rows_fill_it_and_are_never_trained_on(tmp_path, data):
    own = replace(OWN, classes=(), ood=None)
    write_rows(own, SEEDS, data, tmp_path)
    test = {row["text"] for row in lines(tmp_path / "test.jsonl")}
    assert len(test) == study_settings.TEST_ROWS
    assert any(text.startswith("test ") for text in test) and not all(text.startswith("test ") for text in test)
    for seed in SEEDS:
        assert not test & {row["text"] for row in lines(tmp_path / f"seed{seed}" / "train.jsonl")}


def test_a_share_of_all_rows_has_the_label_of_another_class(tmp_path, data):
    write_rows(replace(OWN, noise=0.25), (1,), data, tmp_path)
    rows = [row for name in ("test.jsonl", "seed1/train.jsonl") for row in lines(tmp_path / name)]
    truth = [f"c{int(row['text'].split()[-1]) % 5}" for row in rows]  # of the fixture
    wrong = [row["label"] != true for row, true in zip(rows, truth, strict=True)]
    assert all(row["label"] in OWN.classes for row in rows)
    assert stats.binomtest(sum(wrong), len(wrong), 0.25).pvalue > 0.01  # rows are drawn once: no chance of a re-run
    by_text = {row["text"]: row["label"] for row in rows}
    write_rows(replace(OWN, noise=0.25), (2,), data, tmp_path)
    again = lines(tmp_path / "seed2/train.jsonl")
    assert all(by_text.get(row["text"], row["label"]) == row["label"] for row in again)  # an annotator is consistent


def test_too_few_rows_and_missing_files_are_one_line(tmp_path, data):
    with pytest.raises(BlobError, match="too few short rows for own"):
        write_rows(replace(OWN, rows=3000), SEEDS, data, tmp_path / "a")
    with pytest.raises(BlobError, match="--data_dir is the folder"):
        write_rows(OWN, SEEDS, tmp_path / "nowhere", tmp_path / "b")


def test_the_settings_are_what_the_study_asks_for():
    overfits = [setting for setting in SETTINGS.values() if setting.overfits]
    assert len(overfits) >= 5 and len(SETTINGS) - len(overfits) >= 3
    assert all(setting.passes >= 20 and setting.rows <= 1000 for setting in overfits)


# ----- the grid ---------------------------------------------------------------------------------------------------


def grid(tmp_path, **changes):
    args = StudyArguments(output_dir=str(tmp_path), settings=["cola-128", "banking-60"], seeds=[1, 2, 3], **changes)
    return Grid(args, tmp_path, ("--max_length", "32"))


def finish(run, nll):
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "report.md").write_text("done")
    (run.folder / "calibration_results.json").write_text(json.dumps({"calibration_nll": nll}))


def test_strengths_are_chosen_by_the_held_out_rows_of_the_first_two_seeds(tmp_path):
    found = grid(tmp_path)
    assert found.strengths()["cola-128", "map"] == 0.2  # until anything is known
    for seed, nlls in ((1, (0.6, 0.5, 0.1)), (2, (0.6, 0.3, 0.9)), (3, (0.0, 9.0, 9.0))):
        for value, nll in zip((0.2, 0.05, 0.02), nlls, strict=True):
            finish(found.run("cola-128", "map", seed, value), nll)
    assert found.strengths()["cola-128", "map"] == 0.05  # means .6, .4, .5 of two seeds; the third plays no part
    assert found.strengths()["banking-60", "map"] == 0.2 and ("cola-128", "blob") not in found.strengths()


def test_the_commands_have_the_rows_and_the_flags_of_setting_and_method(tmp_path):
    found = grid(tmp_path)
    run = found.run("banking-60", "blob", 2)
    line = " ".join(run.arguments)
    folder = tmp_path / "data" / "banking-60"
    for part in (
        f"--train_file {folder}/seed2/train.jsonl", f"--validation_file {folder}/test.jsonl", "--seed 2",
        f"--calibration_file {folder}/seed2/held_out.jsonl", f"--ood_file oos={folder}/ood.jsonl", "--method blob",
        "--target_modules query value", "--max_steps 160", "--posterior_scale fit", "--temperature_scaling",
    ):  # fmt: skip
        assert part in line, part
    assert line.endswith("--max_length 32")
    fitted = found.run("cola-128", "tfb", 1, 0.1)
    assert f"--adapter_name_or_path {tmp_path}/runs/cola-128/lora/seed1" in " ".join(fitted.arguments)


def test_methods_that_need_lora_wait_for_it(tmp_path):
    found = grid(tmp_path, methods=["lora", "tfb"])
    assert not found.tuned(needs_lora=True) and not [key for key in found.chosen() if key[1] == "tfb"]
    finish(found.run("cola-128", "lora", 1), 0.5)
    assert {run.name for run in found.tuned(needs_lora=True)} == {
        f"cola-128/tfb-{value}/seed1" for value in ("0.01", "0.1", "1")
    }


def known_rows(folder, method="map", strength=0.05):
    row = {name: 0.5 for name in study_report.SHOWN}
    rows = [
        {"setting": "cola-128", "method": name, "seed": seed, **row, "train_seconds": 1, "networks": 1, "strength": s}
        for name, s in (("lora", np.nan), (method, strength))
        for seed in (1, 2)
    ]
    path = folder / "elsewhere.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_what_is_known_from_elsewhere_is_not_run_again(tmp_path):
    known = study.read_known(str(known_rows(tmp_path)))
    args = StudyArguments(output_dir=str(tmp_path), settings=["cola-128"], seeds=[1, 2, 3], methods=["lora", "map"])
    found = Grid(args, tmp_path, (), known)
    assert [run.name for run in found.first()] == ["cola-128/lora/seed3"]
    assert found.tuned(needs_lora=False) == []
    assert [run.name for run in found.chosen().values()] == ["cola-128/lora/seed3", "cola-128/map-0.05/seed3"]
    args.methods.append("tfb")  # needs the adapters themselves
    assert len(Grid(args, tmp_path, (), known).first()) == 3


def test_results_from_elsewhere_are_reported_and_can_be_known_again(tmp_path, runs, capsys):
    some = {key: runs[key] for key in runs if key[2] == 3}
    known = study.read_known(str(known_rows(tmp_path, "blob", 2.0)))
    study_report.write(tmp_path, some, {}, {("cola-128", "blob"): 2.0}, [], known)
    again = study.read_known(str(tmp_path / "results.csv"))
    part = again[(again["setting"] == "cola-128") & (again["method"] == "blob")]
    assert part["seed"].tolist() == [1, 2, 3] and part["strength"].tolist() == [2.0] * 3
    assert part["nll"].tolist()[:2] == [0.5, 0.5] != part["nll"].tolist()[2:]
    assert "and 4 rows of results of runs elsewhere" in capsys.readouterr().out
    with pytest.raises(BlobError, match="has no column 'strength'"):
        pd.read_csv(tmp_path / "results.csv").drop(columns="strength").to_csv(tmp_path / "old.csv")
        study.read_known(str(tmp_path / "old.csv"))
    with pytest.raises(BlobError, match="cannot be read"):
        study.read_known(str(tmp_path / "nowhere.csv"))


def test_the_stages_go_one_after_another(tmp_path, data, monkeypatch):
    """What is fitted to LoRA is started, at every strength and then at the chosen one, once LoRA is there."""
    monkeypatch.setitem(SETTINGS, "own", OWN)
    started = []

    def complete(runs, script, args):
        started.append([run.name for run in runs])
        for run in runs:
            finish(run, {"0.01": 0.9, "0.1": 0.2, "1": 0.9}.get(run.name.split("/")[1].removeprefix("tfb-"), 0.5))
        return []

    monkeypatch.setattr(study, "complete_runs", complete)
    monkeypatch.setattr(study.study_report, "write", lambda folder, runs, *_: started.append(sorted(runs)))
    flags = ["--settings", "own", "--methods", "lora", "tfb", "--seeds", "1", "2", "3", "--curves", "false"]
    assert run_experiment("study", *flags, "--data_dir", data, "--output_dir", tmp_path / "out") == 0
    lora, blob, tuned, chosen, curves, reported = started
    assert lora == [f"own/lora/seed{seed}" for seed in SEEDS] and blob == curves == []
    assert sorted(tuned) == sorted(f"own/tfb-{value}/seed{seed}" for value in ("0.01", "0.1", "1") for seed in (1, 2))
    assert chosen == ["own/tfb-0.1/seed3"]
    assert reported == sorted(("own", method, seed) for method in ("lora", "tfb") for seed in SEEDS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--settings", "mnli"], "--settings must be among wic-128, "),
        (["--methods", "lora", "vogn"], "--methods must be among lora, "),
        (["--methods", "blob"], "--methods must have lora"),
        (["--seeds", "1", "1"], "--seeds must be different values"),
        (["--seed", "3"], "--seed is set by the experiment"),
        (["--data_dir", "nowhere"], "--data_dir is the folder of the tasks' files"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, message):
    assert run_experiment("study", "--output_dir", tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_fork_launcher_runs_scripts_like_any_other(tmp_path, monkeypatch):
    script = tmp_path / "own_script.py"
    script.write_text(
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
        "print('hello from', folder.name)\n"
        "if 'fail' in sys.argv:\n    sys.exit('error: as asked')\n"
        "(folder / 'report.md').write_text('done')\n"
        "(folder / 'eval_results.json').write_text('{}')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    runs = [GridRun(name, tmp_path / name, flags) for name, flags in (("one", ()), ("two", ("fail",)), ("three", ()))]
    failed = complete_runs(runs, "own_script", GridArguments(launcher="fork", jobs=2))
    assert [run.name for run in failed] == ["two"]
    assert "hello from one" in (tmp_path / "one" / "run.log").read_text()
    assert "error: as asked" in (tmp_path / "two" / "run.log").read_text()


def test_a_fork_server_that_somebody_ended_is_one_line(tmp_path, monkeypatch):
    def gone(self):
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(multiprocessing.get_context("forkserver").Process, "start", gone)
    (tmp_path / "own_script.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BlobError, match="was ended; the same command goes on"):
        complete_runs([GridRun("one", tmp_path / "one", ())], "own_script", GridArguments(launcher="fork"))


# ----- the report -------------------------------------------------------------------------------------------------


def predictions(path, seed, count=80, labelled=True, sharpness=1.0):
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(0).integers(0, 3, count)
    logits = sharpness * (rng.normal(size=(count, 3)) + 1.5 * np.eye(3)[labels])
    rows = []
    for logit, label in zip(log_softmax(logits, axis=1), labels, strict=True):
        row = {"log_probs": logit.tolist(), "mean_log_probs": log_softmax(2 * logit).tolist()}
        rows.append({**row, "label": int(label)} if labelled else row)
    jsonl(path, rows)


def finished(folder, method, seed):
    sharpness = {"lora": 3.0, "lora_early_stopping": 1.5}.get(method, 1.0)
    predictions(folder / "validation_predictions.jsonl", seed, sharpness=sharpness)
    predictions(folder / "ood_oos_predictions.jsonl", seed + 100, labelled=False)
    if method == "blob":
        predictions(folder / "unscaled_validation_predictions.jsonl", seed, sharpness=0.5)
    (folder / "temperature.json").write_text(json.dumps({"predictive": 2.0, "mean": 4.0}))
    (folder / "costs.json").write_text(json.dumps({"train_runtime": 10.0, "fit_runtime": 0.0, "networks": 10}))
    logged = [{"step": s, "eval_nll": s / 9, "eval_ece": 0.1, "eval_accuracy": 0.5} for s in (20, 160)]
    for entry in logged:
        entry |= {f"eval_mean_{name}": 0.4 for name in ("nll", "ece", "accuracy")}
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": logged}))


@pytest.fixture
def runs(tmp_path):
    keys = [
        (setting, method, seed)
        for setting in ("cola-128", "banking-60", "clinc-150")
        for method in ("lora", "lora_early_stopping", "blob")
        for seed in SEEDS
    ]
    folders = {key: tmp_path / "runs" / "-".join(map(str, key)) for key in keys}
    for (_, method, seed), folder in folders.items():
        finished(folder, method, seed)
    return folders


def test_the_numbers_of_a_run(runs):
    rows = {row["method"]: row for row in study_report.read_run(("cola-128", "blob", 1), runs["cola-128", "blob", 1])}
    assert set(rows) == {"blob", "blob + T", "blob, N=0", "blob, N=0 + T", "blob, unscaled"}
    found = lines(runs["cola-128", "blob", 1] / "validation_predictions.jsonl")
    scores, labels = (np.array([row[name] for row in found]) for name in ("log_probs", "label"))
    assert rows["blob"]["nll"] == pytest.approx(-scores[range(80), labels].mean())
    tempered = log_softmax(scores / 2.0, axis=1)
    assert rows["blob + T"]["nll"] == pytest.approx(-tempered[range(80), labels].mean())
    entropy = stats.entropy(np.exp(scores), axis=1)
    wrong = scores.argmax(1) != labels
    assert rows["blob"]["error_auroc"] == pytest.approx(roc_auc_score(wrong, entropy))
    outside = np.array([row["log_probs"] for row in lines(runs["cola-128", "blob", 1] / "ood_oos_predictions.jsonl")])
    joint = np.concatenate([entropy, stats.entropy(np.exp(outside), axis=1)])
    assert rows["blob"]["ood_auroc"] == pytest.approx(roc_auc_score(np.repeat([0, 1], 80), joint))


def test_any_two_methods_are_compared():
    rng = np.random.default_rng(0)
    values = {name: rng.normal(mean, 0.05, (2, 6)) for name, mean in (("a", 0.9), ("b", 0.5))}
    rows = [
        {"setting": setting, "method": name, "seed": seed, **dict.fromkeys(study_report.TESTED, drawn[place, seed])}
        for place, setting in enumerate(("wic-128", "cola-128"))
        for name, drawn in values.items()
        for seed in range(6)
    ]
    note, table = study_report.comparisons_text(pd.DataFrame(rows), "b", "a").split("\n\n")
    assert note.startswith("`a` minus `b`") and f"{(values['a'] - values['b'])[0].mean():+.3f} [" in table
    assert table.count("**better**") == table.count("**worse**") == 4  # higher in all: good for accuracy and AUROC


def test_a_class_of_probability_0_adds_nothing_to_an_entropy():
    certain = np.array([[0.0, -np.inf], [np.log(0.5), np.log(0.5)]])
    found = study_report.measures(certain, np.array([0, 1]), certain[1:])
    assert found["error_auroc"] == 1.0 and found["ood_auroc"] == pytest.approx(0.75)


def test_the_report_compares_on_the_same_seeds_and_corrects(tmp_path, runs, capsys):
    curves = {key: path for key, path in runs.items() if key[1] in ("lora", "blob")}
    study_report.write(tmp_path, runs, curves, {("cola-128", "blob"): 0.5}, ["--dtype", "bfloat16"])
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    results = pd.read_csv(tmp_path / "results.csv")
    first, second = (
        results[(results["setting"] == "cola-128") & (results["method"] == name)]["nll"].to_numpy()
        for name in ("blob", "lora")
    )
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    shown = f"{np.mean(first - second):+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
    assert shown in text
    # three settings with the same numbers: Holm multiplies the smallest of three equal p-values by 3
    p_value = stats.ttest_rel(first, second).pvalue
    assert ((shown + " **better**") in text) == (3 * p_value < 0.05)
    assert "| lora, N=0" not in text and "least -> last" in text and "2.22 at step 20 -> 17.78" in text
    for name in ("curves", "ranks", "reliability_overfitting", "reliability_other"):
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 5000


def test_ranks_are_of_the_seeds_that_all_methods_have():
    """`blob` is the better one on the seed that both have; a second, bad seed that lora lacks must not count."""
    nlls = {("blob", 1): 0.5, ("blob", 2): 9.0, ("lora", 1): 0.7}
    rows = [
        {"setting": setting, "method": method, "seed": seed, "nll": nll}
        for setting in ("wic-128", "cola-128", "clinc-150")
        for (method, seed), nll in nlls.items()
    ]
    ranks = study_report.ranked(pd.DataFrame(rows), "nll").ranks
    assert ranks["blob"] == 1 and ranks["lora"] == 2


def test_of_one_setting_there_are_no_ranks(tmp_path, runs):
    some = {key: path for key, path in runs.items() if key[0] == "cola-128"}
    study_report.write(tmp_path, some, {}, {}, [])
    assert "Fewer than two settings." in (tmp_path / "report.md").read_text()
    study_report.write(tmp_path / "none", {}, {}, {}, [])
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_picture_shows_the_pooled_reliability_and_the_closest_call(tmp_path, runs, capsys):
    study_report.write(tmp_path, runs, {}, {}, [])
    rows = [
        {"id": "test_0", "mean_summary": "They meet on Monday.", "samples": ["They meet on Monday."] * 4},
        {
            "id": "test_1",
            "mean_summary": "They meet at six.",
            "samples": ["They meet at six.", "They meet at ten."] * 2,
        },
    ]
    jsonl(tmp_path / "demo" / "generated_predictions.jsonl", rows)
    out = tmp_path / "picture.png"
    flags = ["picture", "--study", tmp_path, "--summaries", tmp_path / "demo", "--output", out]
    assert run_experiment(*flags) == 0
    assert out.stat().st_size > 10_000 and "dialogue test_1" in capsys.readouterr().out
    assert run_experiment(*flags, "--dialogue", "test_7") == 2
    assert "there is no dialogue 'test_7'" in capsys.readouterr().err
    panels = study_report.pooled_reliability(tmp_path, overfits=True, methods=("lora", "blob"))
    assert set(panels) == {"lora", "blob"}
    # two overfitting settings of 80 rows and three seeds each
    assert panels["lora"].count.sum() == 2 * 3 * 80
    some = {key: path for key, path in runs.items() if key != ("cola-128", "blob", 3)}
    study_report.write(tmp_path, some, {}, {}, [])
    panels = study_report.pooled_reliability(tmp_path, overfits=True, methods=("lora", "blob"))
    assert panels["lora"].count.sum() == panels["blob"].count.sum() == 5 * 80  # the seeds that both have


def test_the_default_methods_are_those_of_the_scripts_and_the_cheap_cures():
    assert set(study.METHODS) == {
        "lora", "lora_early_stopping", "map", "mc_dropout", "ensemble", "laplace", "tfb", "scalabl", "ivon",
        "blob",
    }  # fmt: skip
