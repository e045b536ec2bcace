"""--conformal_alpha: which rows decisions are fitted to, what a run says of them, and that `predict` makes the same."""

import csv
import importlib.util
import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from helpers.models import tiny_tokenizer
from helpers.running import GLUE, SUMMARIZATION, lines, predict, run_script
from helpers.training import blob_bert, rows, trainer

from blob_hf.baselines.conformal import ClassThresholds, PredictionSets, conformal_sets
from blob_hf.baselines.conformal_texts import TextAbstention, TextThreshold
from blob_hf.baselines.temperature import Temperatures, scale
from blob_hf.cli.answering import Answers
from blob_hf.cli.decisions import Decided, drop_decisions, hold_out_decisions, predicted, require_saved, settle_sets
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.routes import find_route
from blob_hf.cli.summary_decisions import abstention_metrics, withheld_sentence
from blob_hf.data import demo
from blob_hf.data.shifted_texts import load_shifted_texts
from blob_hf.utils.errors import BlobError

needs_mapie = pytest.mark.skipif(importlib.util.find_spec("mapie") is None, reason="MAPIE is not installed")
QUICK = ["--demo", "--use_cpu", "true", "--disable_tqdm", "true", "--compare_base", "false", "--max_steps", "5"]
CLASSES = [*QUICK, "--compare_lora", "false", "--eval_samples", "2", "--max_eval_samples", "40"]


def held_out(count):
    return DatasetDict(
        train=Dataset.from_dict({"n": [-1]}),
        calibration=Dataset.from_dict({"n": list(range(count)), "label": [n % 3 for n in range(count)]}),
    )


@needs_mapie
def test_decisions_have_rows_of_their_own():
    splits = held_out(30)
    hold_out_decisions(splits, find_route("blob"), MethodArguments(conformal_alpha=0.1))
    assert sorted(splits["conformal"]["n"]) == list(range(30)) and "calibration" not in splits
    for flags in ({"temperature_scaling": True}, {"posterior_scale": "fit"}, {"early_stopping_patience": 2}):
        splits = held_out(30)
        hold_out_decisions(splits, find_route("blob"), MethodArguments(conformal_alpha=0.1, **flags))
        assert len(splits["conformal"]) == 15 == len(splits["calibration"])
        assert sorted([*splits["conformal"]["n"], *splits["calibration"]["n"]]) == list(range(30))
    splits = held_out(30)
    laplace = MethodArguments("laplace", conformal_alpha=0.1, laplace_prior="validation")
    hold_out_decisions(splits, find_route("laplace"), laplace)
    assert len(splits["conformal"]) == 15
    splits = held_out(16)  # 8 are left, one too few
    with pytest.raises(BlobError, match="at least 9 held-out rows that nothing else is fitted to, got 8"):
        hold_out_decisions(splits, find_route("blob"), MethodArguments(conformal_alpha=0.1, temperature_scaling=True))
    splits = held_out(5)
    hold_out_decisions(splits, find_route("blob"), MethodArguments(temperature_scaling=True))
    assert set(splits) == {"train", "calibration"}


def test_references_of_one_dialogue_are_on_one_side():
    def summaries(dialogues):
        found = [(f"d_{n}_{k}", f"dialogue {n}", f"summary {k}") for n in range(dialogues) for k in (1, 2, 3)]
        names, texts, written = zip(*found, strict=True)
        return DatasetDict(
            calibration=Dataset.from_dict({"id": names, "dialogue": texts, "summary": written})
        )  # as the loader gives them

    wanted = MethodArguments(conformal_alpha=0.1, posterior_scale="fit")
    splits = summaries(18)
    hold_out_decisions(splits, find_route("blob"), wanted, classes=False)
    sides = [set(splits[name]["dialogue"]) for name in ("calibration", "conformal")]
    assert not sides[0] & sides[1] and [len(side) for side in sides] == [9, 9]
    assert len(splits["calibration"]) == len(splits["conformal"]) == 27
    with pytest.raises(BlobError, match="got 8"):  # dialogues, of 24 rows
        hold_out_decisions(summaries(16), find_route("blob"), wanted, classes=False)


def test_what_abstaining_comes_to_by_hand():
    rule = TextAbstention(0.2, 0.5, "token_entropy", 20, TextThreshold(1.0), None, {})
    answers = Answers(["a b", "a b", "x y", "a b", "x y"], {})
    references = [["a b"]] * 5  # the third and the fifth have nothing of them
    found = abstention_metrics(rule, np.array([False, False, False, True, True]), answers, references)
    assert found == pytest.approx(
        {"answered": 0.6, "bad_given": 0.2, "bad_of_answered": 1 / 3, "bad": 0.4, "rougeL_answered": 2 / 3,
         "rougeL": 0.6}
    )  # fmt: skip
    assert abstention_metrics(rule, np.ones(5, dtype=bool), answers, [[]] * 5) == {"answered": 0.0}
    said = withheld_sentence(rule, found, 5)
    assert "20.0% of 5 inputs get a summary of a ROUGE-L below 0.5, and 60.0% get one at all" in said


@needs_mapie
@pytest.mark.parametrize("temperatures", [None, Temperatures(2.0, 1.5)])
def test_what_a_run_decides_is_what_predict_decides(tmp_path, temperatures):
    model = blob_bert()
    if temperatures is not None:
        model.set_companion(temperatures)
    own, data = trainer(tmp_path, model), rows(50, seed=7)
    sets = settle_sets(own, data, MethodArguments(conformal_alpha=0.25), tmp_path)
    assert PredictionSets.load(tmp_path) == sets and sets.rows == 50
    inputs = data.remove_columns("labels")
    for num_samples, thresholds in ((3, sets.predictive), (0, sets.mean)):
        found = own.blob_model.predict(inputs, tiny_tokenizer(), sampling=num_samples)
        covered = found.decisions.sets[range(50), data["labels"]]
        assert covered.sum() == 39  # ceil(51 * 0.75): on the rows that it was fitted to, exactly so many
        np.testing.assert_array_equal(
            found.decisions.sets, conformal_sets(found.probabilities, thresholds.quantile, "lac")
        )
    output = own.predict(data)
    expected = output.predictions.log_probs if temperatures is None else scale(output.predictions.log_probs, 2.0)
    np.testing.assert_allclose(predicted(own.blob_model, output.predictions, True), np.exp(expected), rtol=1e-5)
    decided = Decided.of(sets, own, output)
    found = own.blob_model.predict(inputs, tiny_tokenizer(), sampling=3)
    for index, record in enumerate(found.records()):
        row = decided.row(index, found.class_names)
        assert row == {"prediction_set": record["prediction_set"], "abstain": record["abstain"]}
    metrics = decided.metrics("eval")
    assert metrics["eval_coverage"] == metrics["eval_mean_coverage"] == 39 / 50
    whole, by_class = decided.tables("rows", "validation", "eval", 3, found.class_names)
    assert whole.table.loc["coverage"].tolist() == [39 / 50, 39 / 50] and by_class.table["rows"].sum() == 50
    assert "hold the class of 78.0% of 50 examples" in decided.sentence()


def test_decisions_on_other_probabilities_are_dropped(tmp_path, caplog):
    own = blob_bert()
    rule = PredictionSets(0.1, 0.1, "lac", 9, ClassThresholds(0.5, None), None, {})
    own.set_companion(rule)
    rule.save(own, tmp_path)
    drop_decisions(own, PredictionSets.slot, tmp_path)
    assert own.companion(PredictionSets.slot) is None and not list(tmp_path.iterdir())
    assert "prediction sets hold no more" in caplog.text


@needs_mapie
def test_mistakes_are_one_line(monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    for flags, message in (
        (["--conformal_alpha", "1.5"], "conformal_alpha must be > 0 and < 1, got 1.5"),
        (["--conformal_alpha", "0"], "conformal_alpha must be > 0 and < 1, got 0"),
        (["--conformal_alpha", "0.1", "--conformal_delta", "1"], "conformal_delta must be > 0 and < 1, got 1"),
        (["--conformal_alpha", "0.1", "--calibration_samples", "8"], "at least 9 held-out rows"),
        (
            ["--conformal_alpha", "0.1", "--conformal_score", "aps", "--calibration_samples", "30"],
            "aps needs held-out rows of three or more classes, got 2: take lac",
        ),
        (["--conformal_alpha", "0.1", "--calibration_samples", "20"], "pip install 'blob_hf[conformal]'"),
    ):
        hidden = "mapie" if "20" in flags else None
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *more, hidden=hidden: None if name == hidden else find(name, *more),
        )
        assert run_script(monkeypatch, GLUE, *CLASSES, *flags, "--output_dir", tmp_path) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0]


def test_saved_decisions_are_those_that_are_asked_for():
    rule = PredictionSets(0.1, 0.2, "lac", 9, ClassThresholds(0.5, None), None, {})
    names = ("alpha", "delta", "score")
    require_saved(rule, PredictionSets, MethodArguments(conformal_alpha=0.1, conformal_delta=0.2), names)
    for flags, message in (
        ({"conformal_alpha": 0.2, "conformal_delta": 0.2}, "conformal_alpha: .* with 0.1, not 0.2; ask for that"),
        ({"conformal_alpha": 0.1}, "conformal_delta: .* with 0.2, not 0.1"),
        (
            {"conformal_alpha": 0.1, "conformal_delta": 0.2, "conformal_score": "aps"},
            "conformal_score: .* with lac, not aps",
        ),
    ):
        with pytest.raises(BlobError, match=message):
            require_saved(rule, PredictionSets, MethodArguments(**flags), names)
    with pytest.raises(BlobError, match="was saved without such decisions"):
        require_saved(None, PredictionSets, MethodArguments(conformal_alpha=0.1), names)


# ----- other texts ----------------------------------------------------------------------------------------------


def test_other_texts_are_found_where_they_are(tmp_path, caplog):
    def written(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    chats = written("chats.jsonl", *({"id": f"c{n}", "dialogue": f"A: {n}", "summary": f"s{n}"} for n in range(3)))
    pairs = written("mrpc.dev.jsonl", {"sentence1": "one", "sentence2": "two", "label": 1, "idx": 0})
    found = load_shifted_texts([f"other={chats}", str(pairs)], "dialogue", "summary", limit=2)
    assert list(found) == ["other", "mrpc"]
    assert [(one.id, one.text, one.references) for one in found["other"]] == [
        ("c0", "A: 0", ["s0"]), ("c1", "A: 1", ["s1"])
    ]  # fmt: skip
    assert [(one.text, one.references) for one in found["mrpc"]] == [("one\ntwo", [])]
    with pytest.raises(BlobError, match="two files of other texts are called 'chats'"):
        load_shifted_texts([str(chats), f"chats={pairs}"], "dialogue", "summary")
    half = written("half.jsonl", {"dialogue": "a", "summary": "s"}, {"dialogue": "b", "summary": " "})
    assert [one.references for one in load_shifted_texts([f"a={half}"], "dialogue", "summary")["a"]] == [[], []]
    assert "row 1 of the other texts has no summary: none of that file is scored" in caplog.text
    deep = tmp_path / "lr=1"
    deep.mkdir()
    (deep / "f.jsonl").write_text(half.read_text())
    assert list(load_shifted_texts([f"b={deep / 'f.jsonl'}"], "dialogue", "summary")) == ["b"]
    odd = written("odd.jsonl", {"first": "a", "second": "b"})
    with pytest.raises(BlobError, match="several columns could be the texts: first, second"):
        load_shifted_texts([str(odd)], "dialogue", "summary")


# ----- whole runs -----------------------------------------------------------------------------------------------


@needs_mapie
@pytest.mark.slow
def test_a_run_of_a_classifier_its_evaluation_again_and_predict(monkeypatch, tmp_path, capsys):
    shifted = tmp_path / "noisy.jsonl"
    shifted.write_text("".join(json.dumps(row) + "\n" for row in lines(demo.CLASSIFICATION_FILES["validation"])[:20]))
    flags = ["--ood_file", f"noisy={shifted}", "--conformal_alpha", "0.2"]
    fitted = ["--temperature_scaling", "true", "--calibration_samples", "40", "--output_dir", tmp_path / "run"]
    assert run_script(monkeypatch, GLUE, *CLASSES, *flags, *fitted) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "eval_conformal_results.json").read_text())
    for name in ("report.md", "README.md"):
        text = (tmp_path / "run" / name).read_text()
        assert "decisions, at most 0.2 wrong (40 examples)" in text and "decisions, class by class" in text
        assert "The prediction sets hold the class of" in text and "out of distribution: noisy: decisions" in text
    assert f"{results['eval_coverage']:.4f}" in printed
    rows = lines(tmp_path / "run" / "validation_predictions.jsonl")
    covered = [row["label_name"] in row["prediction_set"] for row in rows]
    assert results["eval_coverage"] == pytest.approx(np.mean(covered))
    ood = json.loads((tmp_path / "run" / "ood_noisy_conformal_results.json").read_text())
    assert {"ood_noisy_coverage", "ood_noisy_answered", "ood_noisy_mean_set_size"} <= set(ood)
    saved = json.loads((tmp_path / "run" / "conformal.json").read_text())
    assert saved["rows"] == 20 and saved["fitted_to"]["temperatures"] is not None
    again = ["--do_eval", "--adapter_name_or_path", tmp_path / "run", "--output_dir", tmp_path / "again"]
    assert run_script(monkeypatch, GLUE, *CLASSES, *flags, *again) == 0
    found = json.loads((tmp_path / "again" / "eval_conformal_results.json").read_text())
    assert found["eval_coverage"] == pytest.approx(results["eval_coverage"])
    capsys.readouterr()
    assert (
        run_script(monkeypatch, GLUE, *CLASSES, "--conformal_alpha", "0.3", *again[:3], "--output_dir", tmp_path / "x")
        == 2
    )
    assert "conformal_alpha: the adapter's decisions were fitted with 0.2, not 0.3" in capsys.readouterr().err
    for name in ("p.jsonl", "p.csv"):
        new = ["--input", shifted, "--num_samples", "2", "--max_length", "64", "--output", tmp_path / name]
        assert predict(tmp_path / "run", *new) == 0
    own, flat = lines(tmp_path / "p.jsonl"), list(csv.DictReader((tmp_path / "p.csv").open()))
    for row, other, expected in zip(own, flat, rows, strict=False):
        assert (row["prediction_set"], row["abstain"]) == (expected["prediction_set"], expected["abstain"])
        assert json.loads(other["prediction_set"]) == row["prediction_set"]
        assert other["abstain"] == str(row["abstain"]).lower()
    assert predict(tmp_path / "run", *new[:-1], tmp_path / "q.jsonl", "--abstain_above", "0") == 0
    assert all(row["abstain"] for row in lines(tmp_path / "q.jsonl"))  # what was asked for wins


@pytest.mark.slow
def test_a_run_of_a_summarizer_and_predict(monkeypatch, tmp_path):
    texts = [{"sentence1": f"The price rose by {n} points.", "sentence2": "Nobody knows why."} for n in range(6)]
    (tmp_path / "news.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    flags = [
        "--max_steps", "20", "--eval_samples", "2", "--max_eval_samples", "12", "--max_predict_samples", "1",
        "--conformal_alpha", "0.3", "--conformal_max_loss", "0.3", "--calibration_samples", "30",
    ]  # fmt: skip
    shifted = ["--ood_file", f"news={tmp_path / 'news.jsonl'}"]
    assert run_script(monkeypatch, SUMMARIZATION, *QUICK, *flags, *shifted, "--output_dir", tmp_path / "run") == 0
    results = json.loads((tmp_path / "run" / "eval_conformal_results.json").read_text())
    rows = lines(tmp_path / "run" / "eval_generated_predictions.jsonl")
    assert results["eval_answered"] == pytest.approx(np.mean([not row["abstain"] for row in rows]))
    dialogues = lines(demo.SUMMARIZATION_FILES["validation"])[:12]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"dialogue": row["dialogue"]}) + "\n" for row in dialogues))
    new = ["--input", tmp_path / "new.jsonl", "--output", tmp_path / "p.jsonl", "--num_samples", "2"]
    assert predict(tmp_path / "run", *new, "--max_new_tokens", "48", "--max_length", "192") == 0
    found = lines(tmp_path / "p.jsonl")
    assert [row["generated_text"] for row in found] == [row["answer"] for row in rows]
    assert [row["abstain"] for row in found] == [row["abstain"] for row in rows]
    below = json.loads((tmp_path / "run" / "conformal_texts.json").read_text())["predictive"]["below"]
    assert [row["abstain"] for row in rows] == [row["uncertainty"]["token_entropy"] >= below for row in found]
    detected = json.loads((tmp_path / "run" / "ood_news_results.json").read_text())
    other = lines(tmp_path / "run" / "ood_news_predictions.jsonl")
    inside = [row["uncertainty"]["token_entropy"] for row in found]
    outside = [row["uncertainty"]["token_entropy"] for row in other]
    wins = np.mean([(a < b) + 0.5 * (a == b) for a in inside for b in outside])
    assert detected["ood_news_token_entropy_auroc"] == pytest.approx(wins, abs=0.03)  # predict rounds
    assert {"ood_news_mutual_information_auroc", "ood_news_mean_token_nll_fpr95"} <= set(detected)
    for name in ("report.md", "README.md"):
        text = (tmp_path / "run" / name).read_text()
        assert "out of distribution: news (6 texts)" in text and "validation: abstention (12 inputs)" in text
