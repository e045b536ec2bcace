"""A user's own files through the classifier's script: names of classes, rows without labels, rare classes."""

import json

import pytest
from helpers.running import GLUE, SUMMARIZATION, run_script
from sklearn.metrics import f1_score

from blob_hf import BlobModel
from blob_hf.data import demo

QUICK = ["--max_steps", 3, "--use_cpu", "true", "--disable_tqdm", "true", "--eval_samples", 2, "--max_length", 24]
BASE = ["--model_name_or_path", demo.BACKBONE_DIR, *QUICK]


def csv(path, labels, columns="id;text;label;channel"):
    rows = [f"r{i};hello, you {i};{label};web" for i, label in enumerate(labels)]
    keep = len(columns.split(";"))
    path.write_text("\n".join([columns, *(";".join(row.split(";")[:keep]) for row in rows)]) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    files = ["--train_file", csv(folder / "train.csv", ["yes", "no", "no", "no"] * 3)]
    files += ["--validation_file", csv(folder / "valid.csv", ["no", "yes", "no"])]
    files += ["--test_file", csv(folder / "test.csv", ["", ""], "id;text")]
    with pytest.MonkeyPatch.context() as patch:
        options = [*files, "--class_weights", "balanced", "--output_dir", folder / "run"]
        assert run_script(patch, GLUE, *BASE, *options) == 0
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_have_the_row_and_the_name_of_its_class(trained):
    scored, unscored = (lines(trained / "run" / f"{split}_predictions.jsonl") for split in ("validation", "test"))
    names = ["no", "yes"]
    for row in (*scored, *unscored):
        best = max((0, 1), key=row["log_probs"].__getitem__)
        assert row["prediction"] == names[best] and 0.5 <= row["probability"] <= 1
        assert row["id"] == f"r{row['index']}" and row["text"] == f"hello, you {row['index']}"
    assert [(row["label"], row["label_name"]) for row in scored] == [(0, "no"), (1, "yes"), (0, "no")]
    assert len(unscored) == 2 and all("label" not in row for row in unscored)
    assert "predict_accuracy" not in json.loads((trained / "run" / "predict_results.json").read_text())


def test_the_report_and_the_card_name_the_classes(trained):
    report = (trained / "run" / "report.md").read_text()
    assert "| class | precision | recall | F1 | support |" in report and "| macro_f1 |" in report
    assert "2 rows without labels were predicted, not scored: test_predictions.jsonl" in report
    assert "| classes | no, yes |" in (trained / "run" / "README.md").read_text()
    rows = lines(trained / "run" / "validation_predictions.jsonl")
    expected = f1_score([row["label_name"] for row in rows], [row["prediction"] for row in rows], average="macro")
    assert json.loads((trained / "run" / "eval_results.json").read_text())["eval_macro_f1"] == pytest.approx(expected)
    config = BlobModel.from_pretrained(trained / "run").get_base_model().config
    assert config.id2label == {0: "no", 1: "yes"} and config.label2id == {"no": 0, "yes": 1}


def test_a_saved_adapter_knows_its_classes(trained, monkeypatch, tmp_path, capfd):
    evaluate = [*BASE, "--adapter_name_or_path", trained / "run", "--output_dir", tmp_path]
    some = csv(tmp_path / "some.csv", ["yes", "yes"])
    assert run_script(monkeypatch, GLUE, *evaluate, "--do_predict", "--test_file", some) == 0
    assert [row["label"] for row in lines(tmp_path / "test_predictions.jsonl")] == [1, 1]
    zero = csv(tmp_path / "zero.csv", ["zero", "yes"])
    assert run_script(monkeypatch, GLUE, *evaluate, "--do_eval", "--validation_file", zero) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last == "error: unknown class 'zero' in row 0 of validation; the 2 classes are no, yes"


def test_a_saved_adapter_knows_its_base(trained, monkeypatch, tmp_path):
    where = BASE.index("--model_name_or_path")
    options = [*BASE[:where], *BASE[where + 2 :], "--do_train", "false", "--output_dir", tmp_path / "again"]
    rows = csv(tmp_path / "rows.csv", ["yes", "no"])
    own = ["--adapter_name_or_path", trained / "run", "--validation_file", rows]
    assert run_script(monkeypatch, GLUE, *options, *own) == 0  # and not roberta-base, which is not here
    assert len(lines(tmp_path / "again" / "validation_predictions.jsonl")) == 2


def test_class_weights_are_not_for_summaries(monkeypatch, tmp_path, capfd):
    options = ["--demo", "--class_weights", "balanced", "--output_dir", tmp_path]
    assert run_script(monkeypatch, SUMMARIZATION, *options) == 2
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith("error: class_weights weighs the classes of a")
