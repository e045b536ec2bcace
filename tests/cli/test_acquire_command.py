"""`blob acquire` against `model.predict` on the whole pool, in blocks that are smaller than it, and what it refuses."""

import json
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.adapters import saved_base
from helpers.models import randomize_b, save_word_llama, tiny_tokenizer, words
from helpers.running import lines, predict, run_blob

from blob_hf import BlobConfig, BlobModel, Sampling, get_blob_model, get_lora_model
from blob_hf.cli import acquire
from blob_hf.cli import acquire as acquire_command
from blob_hf.cli.acquire import Shortlist
from blob_hf.cli.pool import Pool
from blob_hf.inference.answers import Prediction
from blob_hf.inference.choices import ChoiceScoring
from blob_hf.metrics import acquisition
from blob_hf.metrics.acquisition import Acquired
from blob_hf.metrics.acquisition import acquire as acquire_from
from blob_hf.utils.errors import BlobError

SAMPLING = Sampling(4, seed=5)
FLAGS = ["--num_samples", 4, "--seed", 5, "--batch_size", 3]


def texts(rows):
    """Which pair each row is, of the thirty: duplicates differ in rounding, and so may come in either order."""
    return [int(row) % 30 for row in rows]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A classifier with a posterior, one without, and a pool of pairs whose rows 0 to 4 come once more at its end."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    base = saved_base("bert", folder / "base")
    own = BlobConfig(target_modules=["query", "value"], task_type="SEQ_CLS", r=4, init_eps=1.0)
    for name, model in (("blob", get_blob_model(base, own)), ("lora", None)):
        model = model or get_lora_model(saved_base("bert", folder / "base"), own.to_lora())
        randomize_b(model, 1.0)
        dict(model.named_parameters())["base_model.model.classifier.modules_to_save.default.weight"].data.normal_()
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rows = [{"text1": a, "text2": b} for a, b in zip(words(30, seed=1), words(30, seed=2), strict=True)]
    rows = [{**row, "note": f"row {index}"} for index, row in enumerate(rows + rows[:5])]
    jsonl(folder / "pool.jsonl", rows)
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(acquire, "_BATCHES", 2)  # of 6 rows


def choose(folder, output, *flags, adapter="blob", pool="pool.jsonl", count=8):
    paths = ["--pool", folder / pool, "--output", output, "--count", count]
    return run_blob("acquire", folder / adapter, *paths, *FLAGS, *flags)


def predicted(folder, name="blob", sampling=SAMPLING):
    model = BlobModel.from_pretrained(folder / name).eval()
    return model.predict([(row["text1"], row["text2"]) for row in lines(folder / "pool.jsonl")], sampling=sampling)


@pytest.mark.parametrize(("strategy", "of"), [("bald", "epistemic"), ("entropy", "entropy")])
def test_the_rows_of_the_highest_scores_in_their_order(tiny, tmp_path, strategy, of):
    assert choose(tiny, tmp_path / "chosen.jsonl", "--strategy", strategy) == 0
    found, truth = lines(tmp_path / "chosen.jsonl"), predicted(tiny)
    scores = getattr(truth, of)
    best = np.argsort(-scores)[:8]
    ids = [row["id"] for row in found]
    assert texts(ids) == texts(best) and len(set(ids)) == 8
    assert [row["note"] for row in found] == [f"row {index}" for index in ids]
    assert [row["acquired"] for row in found] == list(range(1, 9))
    for name, values in (("acquisition_score", scores), ("entropy", truth.entropy), (
        "epistemic", truth.epistemic
    )):  # fmt: skip
        np.testing.assert_allclose([row[name] for row in found], values[best], rtol=2e-5)


def test_batchbald_is_that_of_the_probabilities_of_the_whole_pool(tiny, tmp_path):
    assert choose(tiny, tmp_path / "chosen.jsonl", "--strategy", "batchbald", count=4) == 0
    found = lines(tmp_path / "chosen.jsonl")
    truth = acquire_from(predicted(tiny).sample_probabilities, 4, "batchbald", seed=5)
    assert texts(row["id"] for row in found) == texts(truth.rows)
    np.testing.assert_allclose([row["acquisition_score"] for row in found], truth.scores, rtol=2e-5)
    bald = predicted(tiny).epistemic
    both = {int(bald[:5].argmax()), 30 + int(bald[:5].argmax())}  # a row and its duplicate
    assert choose(tiny, tmp_path / "bald.jsonl", "--strategy", "bald", count=34) == 0
    assert both <= {row["id"] for row in lines(tmp_path / "bald.jsonl")}


def test_of_few_candidates_the_log_says_from_where_on_others_might_have_been_better(
    tiny, tmp_path, caplog, monkeypatch
):
    assert choose(tiny, tmp_path / "c.jsonl", "--candidates", 9, count=9) == 0
    truth = predicted(tiny)
    kept = np.argsort(-truth.epistemic)[:9]
    among = acquire_from(truth.sample_probabilities[kept], 9, "batchbald", seed=5)
    assert texts(row["id"] for row in lines(tmp_path / "c.jsonl")) == texts(kept[among.rows])
    left_out = np.sort(truth.epistemic)[-10]
    sure = next(place for place, score in enumerate(among.scores) if score < left_out)
    assert f"from row {sure + 1} on, rows beyond the 9 candidates might have added more" in caplog.text
    told = among.scores.cumsum()
    monkeypatch.setattr(acquisition, "TOLD", told[4] / np.log(4) - 1e-4)
    assert choose(tiny, tmp_path / "again.jsonl", "--candidates", 9, count=9) == 0
    assert f"the first 5 rows tell {told[4]:.2f} of the 1.39 nats that 4 networks" in caplog.text


def test_the_log_names_the_first_row_that_adds_too_little(caplog, monkeypatch):
    scores = np.array([0.8, 0.1, 0.4, 0.2])  # they rise again where rows are weighed against each of the chosen
    monkeypatch.setattr(acquire_command, "batch_bald", lambda *_: Acquired(np.arange(4), scores, 2))
    kept = SimpleNamespace(probabilities=np.ones((4, 4, 2)) / 2, best_left_out=0.15, most=4)
    with caplog.at_level("INFO"):
        acquire_command._together(kept, 4, SAMPLING)
    assert "from row 2 on, rows beyond the 4 candidates might have added more" in caplog.text


def test_random_rows_ask_nothing_of_the_model(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(BlobModel, "predict", None)
    assert choose(tiny, tmp_path / "chosen.csv", "--strategy", "random", adapter="lora") == 0
    found = pd.read_csv(tmp_path / "chosen.csv")
    assert len(set(found["id"])) == 8 and found["acquisition_score"].isna().all()
    assert found["acquired"].tolist() == list(range(1, 9)) and "entropy" not in found
    expected = pd.DataFrame(lines(tiny / "pool.jsonl")).loc[found["id"], ["text1", "text2", "note"]]
    assert found[["text1", "text2", "note"]].to_numpy().tolist() == expected.to_numpy().tolist()


def test_a_point_has_an_entropy_but_no_mutual_information(tiny, tmp_path, capsys, caplog):
    assert choose(tiny, tmp_path / "chosen.jsonl", "--strategy", "entropy", adapter="lora") == 0
    assert "untrained" not in caplog.text  # it was not given a posterior
    found, truth = lines(tmp_path / "chosen.jsonl"), predicted(tiny, "lora", Sampling(0))
    assert texts(row["id"] for row in found) == texts(np.argsort(-truth.entropy)[:8])
    assert all("epistemic" not in row for row in found)
    for strategy in ("bald", "batchbald"):
        assert choose(tiny, tmp_path / "none.jsonl", "--strategy", strategy, adapter="lora") == 2
        error = capsys.readouterr().err
        assert "this adapter is a point" in error and "take entropy, or give it a posterior" in error
    assert not (tmp_path / "none.jsonl").exists()


def test_questions_of_multiple_choice(tmp_path, capsys):
    letters = ["A", "B", "C"]
    save_word_llama(tmp_path, ["[PAD]", "[UNK]", "[END]", *letters, *(f"w{i}" for i in range(20))], 0.9)
    model = BlobModel.from_pretrained(tmp_path / "adapter")
    model.set_companion(ChoiceScoring("letter", (3, 4, 5)))
    model.save_pretrained(tmp_path / "adapter")
    rng = np.random.default_rng(0)
    asked = [
        {"id": f"q{n}", "question": " ".join(f"w{i}" for i in rng.integers(0, 20, 4)),
         "choices": [f"w{i}" for i in rng.integers(0, 20, 2 + n % 2)]}
        for n in range(14)
    ]  # fmt: skip
    jsonl(tmp_path / "pool.jsonl", asked)
    assert choose(tmp_path, tmp_path / "chosen.jsonl", "--strategy", "bald", adapter="adapter", count=5) == 0
    found = lines(tmp_path / "chosen.jsonl")
    truth = BlobModel.from_pretrained(tmp_path / "adapter").eval().predict(asked, sampling=SAMPLING)
    best = np.argsort(-truth.epistemic)[:5]
    assert [row["id"] for row in found] == [f"q{n}" for n in best]
    assert all({key: row[key] for key in asked[n]} == asked[n] for n, row in zip(best, found, strict=True))
    np.testing.assert_allclose([row["acquisition_score"] for row in found], truth.epistemic[best], rtol=2e-5)
    # choices without a probability, and in a table lists of several lengths
    assert choose(tmp_path, tmp_path / "batch.csv", adapter="adapter", count=14) == 0
    table = pd.read_csv(tmp_path / "batch.csv")
    assert sorted(table["acquired"]) == list(range(1, 15))
    assert all(json.loads(row["choices"]) == asked[int(row["id"][1:])]["choices"] for _, row in table.iterrows())
    odd = jsonl(tmp_path / "odd.jsonl", [{"question": "w1", "options": ["w1", "w2"]}])
    assert predict(tmp_path / "adapter", "--input", odd, "--output", tmp_path / "odd_predictions.jsonl") == 2
    assert "odd.jsonl has no questions: the adapter answers multiple choice" in capsys.readouterr().err
    with pytest.raises(BlobError, match="has no questions"):
        Pool.read(tmp_path / "adapter", str(jsonl(tmp_path / "texts.jsonl", [{"text": "w1"}])))
    with pytest.raises(BlobError, match="a question has 4 choices"):
        wide = [{"question": "w1", "choices": ["w1", "w2", "w3", "w4"]}]
        Pool.read(tmp_path / "adapter", str(jsonl(tmp_path / "wide.jsonl", wide)))


def test_a_row_is_written_with_all_its_columns_whatever_they_hold():
    columns = {"text": ["a"], "when": [datetime(2020, 1, 2)], "x": [float("nan")], "more": [{"y": [1.5, None]}]}
    row = Pool(Dataset.from_dict(columns), ("text",)).row(0)
    assert json.loads(json.dumps(row, allow_nan=False)) == {
        "id": 0, "text": "a", "when": "2020-01-02 00:00:00", "x": None, "more": {"y": [1.5, None]},
    }  # fmt: skip


def test_the_shortlist_holds_no_more_than_it_must_and_loses_none():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 30, 200) / 10.0  # with ties
    kept = Shortlist(12, with_probabilities=True)
    for start in range(0, 200, 7):
        part = scores[start : start + 7]
        probabilities = np.repeat(part[:, None, None], 2, axis=1)
        kept.add(start, Prediction([], part, probabilities, -part, part, part), part)
        assert len(kept.rows) == len(kept.probabilities) <= 12
    order = np.argsort(-scores, kind="stable")
    assert kept.rows.tolist() == order[:12].tolist() and kept.best_left_out == scores[order[12]]
    assert kept.scores.tolist() == kept.probabilities[:, 0, 0].tolist() == scores[order[:12]].tolist()
    assert kept.facts.tolist() == np.stack([-kept.scores, kept.scores], axis=1).tolist()


def test_mistakes_are_one_line_and_nothing_is_written(tiny, tmp_path, capsys, monkeypatch):
    empty = tmp_path / "empty.csv"
    empty.write_text("text1,text2\n")
    (tmp_path / "none.json").write_text("[]")
    pd.DataFrame({"text": []}).to_parquet(tmp_path / "none.parquet")
    jsonl(tmp_path / "taken.jsonl", [{"text": "w1", "acquired": 1}, {"text": "w2", "acquired": 2}])
    jsonl(tmp_path / "gap.jsonl", [{"text": "w1"}, {"text": None}])
    monkeypatch.setattr(BlobModel, "from_pretrained", None)  # all of it is known before the model is loaded
    pool = ["--pool", tiny / "pool.jsonl"]
    for flags, message in (
        (["--count", 36, *pool], "from 1 to the 35 rows of the pool, got 36"),
        (["--count", 0, *pool], "got 0"),
        (["--count", 3, *pool, "--strategy", "variance"], "invalid choice: 'variance'"),
        (["--count", 3, *pool, "--num_samples", 1], "a single network has no mutual information"),
        (["--count", 3, *pool, "--num_samples", -1, "--strategy", "entropy"], "num_samples must be >= 0"),
        (["--count", 3, *pool, "--text_columns", "body"], "no column 'body'"),
        (["--count", 3, "--pool", empty], "no rows"),
        (["--count", 3, "--pool", tmp_path / "none.json"], "--pool .*none.json has no rows"),
        (["--count", 3, "--pool", tmp_path / "none.parquet"], "--pool .*none.parquet has no rows"),
        (["--count", 3, "--pool", tmp_path / "gone.csv"], "--pool .*gone.csv does not exist"),
        (["--count", 1, "--pool", tmp_path / "taken.jsonl"], "'acquired' has the name of a result"),
        (["--count", 1, "--pool", tmp_path / "gap.jsonl"], "row 1 of pool has no text"),
        (["--count", 3, *pool, "--batch_size", 0], "batch_size must be >= 1"),
        (["--count", 3, *pool, "--candidates", 0], "--candidates must be >= 1"),
    ):
        assert run_blob("acquire", tiny / "blob", *flags, "--output", tmp_path / "c.jsonl") == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and pd.Series(errors).str.contains(message).all(), (flags, errors)
    for output, message in (
        (tiny / "pool.jsonl", "is the pool itself"),
        (tmp_path / "c.parquet", "must be a .jsonl, .csv or .tsv file"),
        (empty, "exists; choose another --output, or --overwrite_output"),
    ):
        assert choose(tiny, output) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c.jsonl").exists() and empty.read_text() == "text1,text2\n"


def test_other_tasks_are_refused(tmp_path, capsys):
    save_word_llama(tmp_path, ["[PAD]", "[UNK]", "[END]", "w1"], 0.9)
    jsonl(tmp_path / "pool.jsonl", [{"text": "w1"}] * 3)
    assert choose(tmp_path, tmp_path / "c.jsonl", adapter="adapter", count=2) == 2
    assert "this one writes texts" in capsys.readouterr().err
    base = saved_base("bert", tmp_path / "one", num_labels=1)
    config = BlobConfig(target_modules=["query"], task_type="SEQ_CLS")
    get_blob_model(base, config).save_pretrained(tmp_path / "regression")
    tiny_tokenizer().save_pretrained(tmp_path / "regression")
    assert choose(tmp_path, tmp_path / "c.jsonl", adapter="regression", count=2) == 2
    assert "needs one of two or more classes; this model has 1" in capsys.readouterr().err


def test_what_fails_halfway_leaves_what_was_there(tiny, tmp_path, monkeypatch, capsys):
    output = tmp_path / "chosen.jsonl"
    output.write_text("old\n")
    predict, calls = BlobModel.predict, []

    def failing(self, *args, **options):
        calls.append(1)
        if len(calls) > 2:
            raise BlobError("as asked")
        return predict(self, *args, **options)

    monkeypatch.setattr(BlobModel, "predict", failing)
    assert choose(tiny, output, "--overwrite_output") == 2
    assert "as asked" in capsys.readouterr().err and len(calls) == 3
    assert output.read_text() == "old\n" and [path.name for path in tmp_path.iterdir()] == ["chosen.jsonl"]
    calls.append(-9)
    monkeypatch.setattr(BlobModel, "predict", predict)
    assert choose(tiny, output, "--overwrite_output") == 0
    assert len(lines(output)) == 8
