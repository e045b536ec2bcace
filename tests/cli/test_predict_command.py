"""`blob predict` on files without labels, against what the scripts measured with the same adapter and samples."""

import json
import re

import numpy as np
import pytest
from helpers.running import GLUE, SUMMARIZATION, run_script

from blob_hf.__main__ import main
from blob_hf.data import demo

QUICK = ["--demo", "--max_steps", 3, "--use_cpu", "true", "--disable_tqdm", "true", "--compare_base", "false"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def predict(*arguments):
    """Exit code of the command."""
    try:
        main(["predict", *map(str, arguments)])
    except SystemExit as exit_:
        return exit_.code
    return 0


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    own = ["--eval_samples", 3, "--max_eval_samples", 20, "--init_eps", 0.7, "--output_dir", folder / "run"]
    with pytest.MonkeyPatch.context() as patch:
        assert run_script(patch, GLUE, *QUICK, *own) == 0
    texts = [{**row, "label": None} for row in lines(demo.CLASSIFICATION_FILES["validation"])[:20]]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def test_a_classifier_gives_the_probabilities_that_the_script_evaluated(classifier, tmp_path):
    options = ["--num_samples", 3, "--max_length", 64, "--batch_size", 7]
    paths = ["--input", classifier / "texts.jsonl", "--output", tmp_path / "p.jsonl"]
    assert predict(classifier / "run", *paths, *options) == 0
    rows, expected = lines(tmp_path / "p.jsonl"), lines(classifier / "run" / "validation_predictions.jsonl")
    assert len(rows) == len(expected) == 20 and [row["index"] for row in rows] == list(range(20))
    for row, own in zip(rows, expected, strict=True):
        probabilities = list(row["probabilities"].values())
        np.testing.assert_allclose(probabilities, np.exp(own["log_probs"]), rtol=1e-4)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert row["entropy"] == pytest.approx(-sum(p * np.log(p) for p in probabilities), rel=1e-4)
    assert max(row["mutual_information"] for row in rows) > 0


def test_mistakes_are_one_line_and_nothing_is_written(classifier, tmp_path, capsys):
    two = tmp_path / "two.csv"
    two.write_text("question,answer\na,b\n")
    for arguments, message in (
        ([classifier / "run", "--input", two], "which columns are the texts.*question, answer"),
        ([classifier / "run", "--input", two, "--text_columns", "reply"], "no column 'reply'"),
        ([tmp_path, "--input", classifier / "texts.jsonl"], "expected a folder or Hub repo"),
        ([classifier / "run", "--input", tmp_path / "gone.csv"], "does not exist"),
        ([classifier / "run", "--input", classifier / "texts.jsonl", "--num_samples", -1], "num_samples must be >= 0"),
    ):
        assert predict(*arguments, "--output", tmp_path / "p.jsonl") == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        assert re.search(message, error[0]), error[0]
    assert not (tmp_path / "p.jsonl").exists()


def test_a_summarizer_writes_the_texts_that_the_script_wrote(monkeypatch, tmp_path):
    own = ["--eval_samples", 2, "--max_eval_samples", 3, "--do_train", "--do_eval", "--decoding", "predictive"]
    own += ["--init_eps", 0.7, "--output_dir", tmp_path / "run", "--max_target_length", 24]
    assert run_script(monkeypatch, SUMMARIZATION, *QUICK, *own) == 0
    dialogues = [{"dialogue": row["dialogue"]} for row in lines(demo.SUMMARIZATION_FILES["validation"])[:3]]
    (tmp_path / "dialogues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    options = ["--num_samples", 2, "--max_length", 192, "--max_new_tokens", 24]
    paths = ["--input", tmp_path / "dialogues.jsonl", "--output", tmp_path / "p.jsonl"]
    assert predict(tmp_path / "run", *paths, *options) == 0
    by_the_script = lines(tmp_path / "run" / "eval_generated_predictions.jsonl")
    for row, expected in zip(lines(tmp_path / "p.jsonl"), by_the_script, strict=True):
        assert (row["summary"], row["samples"]) == (expected["summary"], expected["samples"])
        for name, value in row["uncertainty"].items():
            assert value == pytest.approx(expected["uncertainty"][name], rel=1e-3, abs=1e-5)
