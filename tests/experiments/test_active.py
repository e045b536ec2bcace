"""Active learning: the pools it draws, what a round is trained on, what is reused, and its report on known numbers."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers.adapters import saved_base
from helpers.models import tiny_tokenizer
from helpers.running import GLUE, lines, run_experiment, run_script
from scipy import stats

from blob_hf import BlobError, BlobModel, Sampling
from blob_hf.experiments import active, active_report
from blob_hf.experiments.active import ActiveArguments, Chain, Rounds
from blob_hf.experiments.active_settings import ACTIVE, ActiveSetting, write_pool
from blob_hf.experiments.study_settings import Setting
from blob_hf.reporting.active_plots import plot_learning

CLASSES = ("c0", "c1", "c2")
TASK = Setting(
    "own", True, "train.jsonl", "test.jsonl", rows=30, held_out=0, steps=2, learning_rate=1e-2, max_words=9,
    columns=("text",), targets=("query", "value"),
)  # fmt: skip
OWN = ActiveSetting(TASK, initial=5, count=4, test_rows=12)
SEEDS = (1, 2)


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setitem(ACTIVE, "own", OWN)
    rows = [{"text": f"w{4 + n // 50} w{4 + n % 50}", "label": CLASSES[n % 3]} for n in range(90)]
    jsonl(tmp_path / "data" / "train.jsonl", rows)
    jsonl(tmp_path / "data" / "test.jsonl", [{"text": f"a {row['text']}", "label": row["label"]} for row in rows[:8]])
    return tmp_path / "data"


def truth(text):
    """The label of a row of the fixture."""
    first, second = (int(word[1:]) - 4 for word in text.split()[-2:])
    return CLASSES[(50 * first + second) % 3]


# ----- the pools --------------------------------------------------------------------------------------------------


def test_a_pool_has_none_of_the_test_rows_and_the_first_rows_have_all_classes(tmp_path, data):
    write_pool(OWN, SEEDS, data, tmp_path)
    test = {row["text"] for row in lines(tmp_path / "test.jsonl")}
    assert len(test) == 12 and sum(text.startswith("a ") for text in test) == 8  # filled up with training rows
    pools = {}
    for seed in SEEDS:
        first, pool = (lines(tmp_path / f"seed{seed}" / f"{name}.jsonl") for name in ("initial", "pool"))
        assert {row["label"] for row in first[:3]} == set(CLASSES) and len(first) == 5
        assert [row["id"] for row in pool] == list(range(30))
        texts = [row["text"] for row in first + pool]
        assert len(set(texts)) == 35 and not test & set(texts)
        assert all(row["label"] == truth(row["text"]) for row in first + pool)
        pools[seed] = texts
    assert pools[1] != pools[2]
    write_pool(ActiveSetting(TASK, 5, 4, copies=3, test_rows=12), (1,), data, tmp_path / "copies")
    copied = pd.Series([row["text"] for row in lines(tmp_path / "copies" / "seed1" / "pool.jsonl")])
    assert copied.value_counts().tolist() == [3] * 30 and copied[:30].duplicated().any()
    for initial, message in ((2, "of 3 classes: own takes 2 at first"), (60, "has 78 short rows")):
        with pytest.raises(BlobError, match=message):
            write_pool(ActiveSetting(TASK, initial, 4, test_rows=20), (1,), data, tmp_path / "no")


def test_the_settings_are_the_three_tasks():
    assert set(ActiveArguments().settings) == {"banking77", "clinc150", "mrpc"} <= set(ACTIVE)
    assert ACTIVE["banking77"].initial == 77 and ACTIVE["clinc150"].initial == 150


# ----- the rounds -------------------------------------------------------------------------------------------------


def flags(tmp_path, data, *arms, rounds=2):
    return [
        "--settings", "own", "--seeds", "1", "--rounds", rounds, "--arms", *arms, "--data_dir", data,
        "--output_dir", tmp_path / "out", "--acquire_samples", 3,
    ]  # fmt: skip


def finish(run, accuracy=0.5):
    values = {f"eval_{name}": accuracy for name in active_report.METRICS}
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "report.md").write_text("done")
    (run.folder / "eval_results.json").write_text(json.dumps(values))


@pytest.fixture
def faked(monkeypatch):
    """Runs that end at once, and a model by which the last rows of a pool are best; what was asked for."""
    seen = {"runs": [], "asked": [], "fails": ""}

    def complete(runs, script, args):
        assert script == "run_glue_blob"
        seen["runs"] += [run.name for run in runs]
        for run in runs:
            if run.name != seen["fails"]:
                finish(run)
        return [run for run in runs if run.name == seen["fails"]]

    class Model:
        def to(self, device):
            return self

    def choose(model, pool, strategy, count, sampling, *rest, **options):
        assert pool.rows.column_names == ["id", "text"]  # no labels
        seen["asked"].append((strategy, count, sampling, len(pool)))
        return [{**pool.row(index), "acquired": n + 1} for n, index in enumerate(range(len(pool) - 1, -1, -1)[:count])]

    monkeypatch.setattr(active, "complete_runs", complete)
    monkeypatch.setattr(active, "load_networks", lambda folder: Model())
    monkeypatch.setattr(active, "acquire_rows", choose)
    return seen


def test_rounds_are_trained_on_what_was_labelled_before_and_chosen_since(tmp_path, data, faked):
    arms = ("blob-random", "blob-bald", "lora-random")
    assert run_experiment("active", *flags(tmp_path, data, *arms)) == 0
    first = ["own/blob/seed1/round0", "own/lora/seed1/round0"]  # the first training is of all strategies
    assert faked["runs"] == first + [f"own/{arm}/seed1/round{n}" for n in (1, 2) for arm in arms]
    assert faked["asked"] == [("bald", 4, Sampling(3, 1), 30), ("bald", 4, Sampling(3, 1), 26)]
    initial = lines(tmp_path / "out" / "data" / "own" / "seed1" / "initial.jsonl")
    for arm in arms:
        rows = tmp_path / "out" / "rows" / "own" / arm / "seed1"
        chosen = [lines(rows / f"chosen{n}.jsonl") for n in (1, 2)]
        assert len({row["id"] for part in chosen for row in part}) == 8
        new = [{name: row[name] for name in ("text", "label")} for part in chosen for row in part]
        assert all(row["label"] == truth(row["text"]) for row in new)
        assert lines(rows / "labelled2.jsonl") == initial + new
    bald = tmp_path / "out" / "rows" / "own" / "blob-bald" / "seed1"
    assert [row["id"] for row in lines(bald / "chosen2.jsonl")] == [25, 24, 23, 22]
    report = pd.read_csv(tmp_path / "out" / "curves.csv")
    assert (report["distinct"] == report["labelled"]).all() and (report["classes"] == 3).all()
    assert report.groupby("arm")["labelled"].apply(list).tolist() == [[5, 9, 13]] * 3


def test_after_a_kill_what_is_there_is_not_done_again(tmp_path, data, faked):
    line = flags(tmp_path, data, "blob-random", "blob-entropy")
    faked["fails"] = "own/blob-entropy/seed1/round1"
    assert run_experiment("active", *line) == 2  # its chain stops, the other goes on
    assert not (tmp_path / "out" / "rows" / "own" / "blob-entropy" / "seed1" / "chosen2.jsonl").exists()
    assert (tmp_path / "out" / "runs" / "own" / "blob-random" / "seed1" / "round2" / "report.md").is_file()
    rows = tmp_path / "out" / "rows" / "own" / "blob-entropy" / "seed1"
    before = (rows / "chosen1.jsonl").read_bytes()
    (rows / "labelled1.jsonl").unlink()  # killed between the two files
    faked.update(fails="", runs=[], asked=[])
    assert run_experiment("active", *line) == 0
    assert faked["runs"] == [f"own/blob-entropy/seed1/round{n}" for n in (1, 2)]
    assert [asked[0] for asked in faked["asked"]] == ["entropy"] and (rows / "chosen1.jsonl").read_bytes() == before
    faked.update(runs=[], asked=[])
    assert run_experiment("active", *flags(tmp_path, data, "blob-random", "blob-entropy", rounds=3)) == 0  # goes on
    assert faked["runs"] == ["own/blob-random/seed1/round3", "own/blob-entropy/seed1/round3"]


def test_the_command_of_a_run(tmp_path, data):
    args = ActiveArguments(output_dir=str(tmp_path), settings=["own"], arms=["blob-random", "blob-bald"])
    run = Rounds(args, tmp_path, ("--max_length", "32")).run(Chain("own", "blob-bald", 2), 1)
    line = " ".join(run.arguments)
    for part in (
        f"--train_file {tmp_path}/rows/own/blob-bald/seed2/labelled1.jsonl", "--seed 2", "--method blob",
        f"--validation_file {tmp_path}/data/own/test.jsonl", "--target_modules query value", "--max_steps 2",
    ):  # fmt: skip
        assert part in line, part
    assert line.endswith("--max_length 32") and run.folder == tmp_path / "runs/own/blob-bald/seed2/round1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--settings", "sst2"], "--settings must be among banking77, clinc150, mrpc"),
        (
            ["--arms", "blob-variance"],
            "a hyphen and a strategy (random, entropy, bald, batchbald); got 'blob-variance'",
        ),
        (["--arms", "tfb-bald"], "got 'tfb-bald'"),
        (["--arms", "lora-random", "lora-bald"], "--arms lora-bald: bald compares two or more networks"),
        (["--arms", "blob-random", "blob-bald", "--acquire_samples", "1"], "--arms blob-bald: bald compares two"),
        (["--arms", "blob-bald"], "--arms must have blob-random, which blob-bald is compared with"),
        (["--seeds", "1", "1"], "--seeds must be different values"),
        (["--rounds", "0"], "--rounds must be >= 1"),
        (["--rounds", "20"], "20 rounds of 40 rows cannot be chosen from the pool of banking77, which has 500"),
        (["--count", "0"], "cannot be chosen"),
        (["--train_file", "x.csv"], "--train_file is set by the experiment"),
        (["--data_dir", "nowhere"], "--data_dir is the folder of the tasks' files"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, message):
    assert run_experiment("active", "--output_dir", tmp_path / "out", *flags) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.slow
def test_a_round_is_chosen_by_the_adapter_that_the_run_before_has_saved(tmp_path, data, monkeypatch):
    saved_base("bert", tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")

    def complete(runs, script, args):
        for run in runs:
            assert run_script(monkeypatch, GLUE, *run.arguments, "--output_dir", run.folder) == 0
        return []

    monkeypatch.setattr(active, "complete_runs", complete)
    line = flags(tmp_path, data, "blob-random", "blob-bald", rounds=1)
    own = ["--model_name_or_path", tmp_path / "base", "--use_cpu", "true", "--eval_samples", 2, "--init_eps", 0.7]
    assert run_experiment("active", *line, *own) == 0
    out = tmp_path / "out"
    found = lines(out / "rows" / "own" / "blob-bald" / "seed1" / "chosen1.jsonl")
    model = BlobModel.from_pretrained(out / "runs" / "own" / "blob" / "seed1" / "round0").eval()
    pool = lines(out / "data" / "own" / "seed1" / "pool.jsonl")
    scores = model.predict([row["text"] for row in pool], sampling=Sampling(3, seed=1)).epistemic
    assert [row["id"] for row in found] == np.argsort(-scores, kind="stable")[:4].tolist()
    results = json.loads((out / "runs" / "own" / "blob-bald" / "seed1" / "round1" / "eval_results.json").read_text())
    curves = pd.read_csv(out / "curves.csv")
    row = curves[(curves["arm"] == "blob-bald") & (curves["round"] == 1)].iloc[0]
    assert row["labelled"] == 9 and row["nll"] == pytest.approx(results["eval_nll"])


# ----- the report -------------------------------------------------------------------------------------------------


def known(seeds=(1, 2, 3), arms=("blob-random", "blob-bald", "lora-random", "lora-entropy")):
    rng = np.random.default_rng(0)
    return [
        {
            "setting": setting, "arm": arm, "seed": seed, "method": arm.split("-")[0], "strategy": arm.split("-")[1],
            "round": number, "labelled": 10 + [0, 5, 20][number], "distinct": 10 + number + seed, "classes": 3,
            **{name: rng.normal() + 5 * arm.endswith("bald") for name in active_report.METRICS},
        }
        for setting in ("banking77", "mrpc") for arm in arms for seed in seeds for number in range(3)
    ]  # fmt: skip


def test_areas_are_those_of_trapezoids_and_differences_are_paired_and_corrected(tmp_path, capsys):
    rows = known()
    rows[0]["accuracy"] = 100.0
    active_report.write(tmp_path, rows, ["--dtype", "bfloat16"])
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out and "24 sequences" in text and "--dtype bfloat16" in text
    areas = pd.read_csv(tmp_path / "areas.csv").set_index(["setting", "arm", "seed"]).sort_index()
    a, b, c = (row["accuracy"] for row in rows[:3])
    assert areas.loc["banking77", "blob-random", 1]["accuracy"] == pytest.approx(
        (5 * (a + b) / 2 + 15 * (b + c) / 2) / 20
    )
    nll = areas["nll"]
    pairs = {
        (setting, arm): (nll[setting, arm], nll[setting, f"{arm.split('-')[0]}-random"])
        for setting in ("banking77", "mrpc") for arm in ("blob-bald", "lora-entropy")
    }  # fmt: skip
    p_values = {key: stats.ttest_rel(*pair).pvalue for key, pair in pairs.items()}
    own = pairs["mrpc", "blob-bald"]
    interval = stats.ttest_rel(*own).confidence_interval(0.95)
    shown = f"{np.mean(own[0] - own[1]):+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
    assert shown in text
    smaller = sum(p < p_values["mrpc", "blob-bald"] for p in p_values.values())
    assert (f"{shown} **worse**" in text) == ((4 - smaller) * p_values["mrpc", "blob-bald"] < 0.05)  # more NLL
    part = [row["nll"] for row in rows if (row["setting"], row["arm"], row["round"]) == ("mrpc", "lora-random", 1)]
    low, high = stats.t.interval(0.95, 2, np.mean(part), stats.sem(part))
    assert f"{np.mean(part):.3f} [{low:.3f}, {high:.3f}]" in text
    assert "| mrpc | blob-bald | 30.0 | 14.0 | 3.0 |" in text
    rival = text.split("against lora-entropy")[1].split("##")[0]
    assert "| mrpc | blob-bald |" in rival and "| mrpc | lora-entropy |" not in rival
    assert (tmp_path / "plots" / "learning.png").stat().st_size > 10_000


def test_a_learning_curve_is_the_means_and_its_band_the_interval(tmp_path):
    points = pd.DataFrame(
        {"setting": "mrpc", "arm": "blob-bald", "metric": "nll", "labelled": [20, 10], "value": [1.0, 2.0],
         "low": [0.5, float("-inf")], "high": [1.5, float("inf")]}
    )  # fmt: skip
    figure = plot_learning(points, {"nll": ("NLL", 10.0)}, tmp_path / "curve.png")
    (axis,) = figure.axes
    (line,) = axis.get_lines()
    assert line.get_xdata().tolist() == [10, 20] and line.get_ydata().tolist() == [20.0, 10.0]
    (band,) = axis.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices.tolist()} == {(20.0, 5.0), (20.0, 15.0)}
    assert axis.get_title() == "mrpc" and axis.get_ylabel() == "NLL"


def test_sequences_that_lack_a_round_have_no_area_and_one_seed_no_interval(tmp_path):
    rows = known(seeds=(1,), arms=("blob-random", "blob-bald"))
    rows = [row for row in rows if not (row["arm"] == "blob-bald" and row["setting"] == "mrpc" and row["round"] == 2)]
    active_report.write(tmp_path, rows, [])
    areas = pd.read_csv(tmp_path / "areas.csv")
    assert list(zip(areas["setting"], areas["arm"], strict=True)) == [
        ("banking77", "blob-random"), ("banking77", "blob-bald"), ("mrpc", "blob-random"),
    ]  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    assert "inf" not in text and "There is no lora-entropy" in text
    active_report.write(tmp_path / "none", [], [])
    assert not (tmp_path / "none").exists()
    active_report.write(tmp_path / "start", [row for row in rows if row["round"] == 0], [])
    assert "No sequence has all its rounds yet." in (tmp_path / "start" / "report.md").read_text()
