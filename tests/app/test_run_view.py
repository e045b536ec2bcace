"""A run's folder on the page, against its files."""

import json
import math
import re

import numpy as np
import pytest
from helpers.models import TARGETS, tiny_bert

from blob_hf import BlobConfig, get_blob_model
from blob_hf.app.beside import examples_of_file, saved_evaluation, saved_examples
from blob_hf.app.run_markup import plots_html, rows_html, top_html
from blob_hf.app.run_view import AS_SAVED, LEAST_CERTAIN, MOST_CERTAIN, WORST, run_view
from blob_hf.baselines.temperature import Temperatures
from blob_hf.utils.errors import BlobError

PROBABILITIES = [[0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.3, 0.7]]
LABELS = [0, 0, 1, 1]
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc000000301010018dd8d"
    "b00000000049454e44ae426082"
)


def entropy(row):
    return -sum(p * math.log(p) for p in row)


@pytest.fixture
def small_run(tmp_path):
    folder = tmp_path / "run"
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "kl.png").write_bytes(PIXEL)
    (folder / "report.md").write_text("# A <b>report</b>\n\nIt went well.\n\n## Plots\n\n![kl](plots/kl.png)\n")
    (folder / "eval_results.json").write_text(json.dumps({"eval_num_samples": 7}))
    rows = [
        {
            "index": i, "idx": 10 + i, "sentence1": f"first <{i}>", "sentence2": f"second {i}",
            "prediction": "ny"[int(np.argmax(p))], "probability": max(p), "label": label, "label_name": "ny"[label],
            "log_probs": np.log(p).tolist(), "mean_log_probs": np.log(p).tolist(),
        }
        for i, (p, label) in enumerate(zip(PROBABILITIES, LABELS, strict=True))
    ]  # fmt: skip
    (folder / "validation_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_of_a_classifier_in_every_order(small_run):
    view = run_view(small_run)
    (saved,) = view.predictions
    assert saved.split == "validation" and [row.name for row in saved.rows] == ["10", "11", "12", "13"]
    doubts = [entropy(p) for p in PROBABILITIES]
    risks = [-math.log(p[label]) for p, label in zip(PROBABILITIES, LABELS, strict=True)]
    for order, expected in (
        (LEAST_CERTAIN, np.argsort(np.negative(doubts))), (MOST_CERTAIN, np.argsort(doubts)),
        (WORST, np.argsort(np.negative(risks))), (AS_SAVED, range(4)),
    ):  # fmt: skip
        assert [row.name for row in saved.ordered(order)] == [str(10 + i) for i in expected], order
    assert [row.is_wrong for row in saved.rows] == [False, True, True, False]
    shown = rows_html(saved, saved.ordered(WORST), "all")
    assert shown.index("first &lt;2&gt;") < shown.index("first &lt;0&gt;") and "first <2>" not in shown
    assert f"{doubts[1]:.3f}" in shown and shown.count("✗") == 2
    top = top_html(saved)
    assert re.search(r"The 4 worst.*?>12<.*The 4 least certain.*?>11<", top, re.DOTALL)
    with pytest.raises(BlobError, match="there is no order"):
        saved.ordered("backwards")


def test_what_was_decided_by_a_fitted_rule_stands_beside_the_answers(small_run):
    path = small_run / "validation_predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (saved,) = run_view(small_run).predictions
    assert "fitted rule" not in rows_html(saved, saved.rows, "all")
    for row, chosen, abstain in zip(rows, (["n"], [], ["y", "<n>"], ["y"]), (False, True, True, False), strict=True):
        row |= {"prediction_set": chosen, "abstain": abstain}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (saved,) = run_view(small_run).predictions
    assert [row.prediction_set for row in saved.rows] == ["n", "none", "y, <n>", "y"]
    assert [row.rule for row in saved.rows] == ["answer", "ask a person", "ask a person", "answer"]
    shown = rows_html(saved, saved.rows, "all")
    assert '<th scope="col">prediction set</th><th scope="col">fitted rule</th><th scope="col">truth</th>' in shown
    assert "<td>y, &lt;n&gt;</td><td>ask a person</td>" in shown


def test_the_report_has_no_dead_images_and_the_plots_are_in_the_page(small_run):
    view = run_view(small_run)
    assert "It went well." in view.report and "plots/kl.png" not in view.report
    assert 'alt="kl" src="data:image/png;base64,' in plots_html(view.plots)


def test_the_evaluation_is_that_of_the_saved_rows_with_the_temperature(small_run):
    model = get_blob_model(tiny_bert(2), BlobConfig(target_modules=TARGETS["bert"]))
    found = saved_evaluation(small_run, model)
    assert found.split == "validation" and found.num_samples == 7 and len(found) == 4
    np.testing.assert_allclose(found.entropy, [entropy(p) for p in PROBABILITIES])
    at = found.at(entropy(PROBABILITIES[2]))
    assert (at.answered, at.risk) == (2, 0.5)  # those of 0.9 and 0.8, of which the second is wrong
    model.set_companion(Temperatures(2.0, 3.0))
    scaled = [np.sqrt(p) / np.sqrt(p).sum() for p in PROBABILITIES]
    np.testing.assert_allclose(saved_evaluation(small_run, model).entropy, [entropy(p) for p in scaled])
    other = get_blob_model(tiny_bert(3), BlobConfig(target_modules=TARGETS["bert"]))
    with pytest.raises(BlobError, match="line 1 of .* is damaged .it is not of the 3 classes"):
        saved_evaluation(small_run, other)
    (small_run / "validation_predictions.jsonl").unlink()
    assert saved_evaluation(small_run, model) is None


def test_examples_are_texts_of_the_evaluation_set(small_run):
    assert set(saved_examples(small_run)) == {(f"first <{i}>", f"second {i}") for i in range(4)}


def test_examples_of_a_file_of_several_texts_name_their_columns(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"one": "a", "two": "b", "three": "c"}) + "\n")
    with pytest.raises(BlobError, match="several columns could be the texts: one, two, three; .* in text_columns"):
        examples_of_file(str(path))
    assert examples_of_file(str(path), ["three", "one"]) == [("c", "a")]
    with pytest.raises(BlobError, match="^--examples .* does not exist"):
        examples_of_file(str(tmp_path / "gone.jsonl"))
    (tmp_path / "ragged.csv").write_text("one,two\na,b,c\n")
    with pytest.raises(BlobError, match="or name the delimiter$"):  # by no flag: a page has none
        examples_of_file(str(tmp_path / "ragged.csv"))


def test_rows_of_a_summarizer_with_their_dialogues(tmp_path):
    dialogues = tmp_path / "dialogues.jsonl"
    dialogues.write_text(
        "".join(json.dumps({"id": f"d{i}", "dialogue": f"talk {i}", "summary": "s"}) + "\n" for i in range(3))
    )
    settings = {"text_column": "dialogue", "validation_file": str(dialogues), "test_file": str(tmp_path / "gone.jsonl")}
    (tmp_path / "run_settings.json").write_text(json.dumps(settings))
    rows = [
        {
            "id": f"d{i}", "references": ["a", "b"], "summary": f"said {i}", "mean_summary": f"mean {i}",
            "mean_scores": {"rougeL": 0.9}, "summary_scores": {"rougeL": quality},
            "uncertainty": {"dissimilarity": doubt, "cluster_entropy": 1 - doubt}, "abstain": doubt > 0.25,
        }
        for i, (quality, doubt) in enumerate([(0.5, 0.1), (0.9, 0.3), (0.2, 0.2)])
    ]  # fmt: skip
    (tmp_path / "eval_generated_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (saved,) = run_view(tmp_path).predictions
    assert [row.name for row in saved.ordered(WORST)] == ["d2", "d0", "d1"]
    assert [row.name for row in saved.ordered(LEAST_CERTAIN)] == ["d1", "d2", "d0"]
    assert [row.name for row in saved.ordered(LEAST_CERTAIN, "cluster_entropy")] == ["d0", "d2", "d1"]
    assert [row.rule for row in saved.rows] == ["answer", "ask a person", "answer"]
    assert "talk 1" in rows_html(saved, saved.rows, "all")
    assert saved_examples(tmp_path) == [("talk 0",), ("talk 1",), ("talk 2",)]


def test_mistakes_are_one_line(tmp_path):
    for folder, said in (
        (tmp_path / "gone", "there is no folder"),
        (tmp_path, "has neither report.md nor predictions"),
    ):
        with pytest.raises(BlobError, match=said) as error:
            run_view(folder)
        assert "\n" not in str(error.value)


GOOD = {"prediction": "a", "probability": 0.5, "log_probs": [math.log(0.5)] * 2, "label": 1}


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"prediction": "a", "log_probs"', "Expecting"), ("[1, 2]", "no JSON object"), ("3", "no JSON object"),
        (json.dumps({**GOOD, "label": 2}), "label 2 is none of 2 classes"),
        (json.dumps({**GOOD, "label": -1}), "label -1 is none of 2 classes"),
        (json.dumps({**GOOD, "log_probs": None}), "log_probs is no list of numbers"),
        *((json.dumps({key: value for key, value in GOOD.items() if key != name}), f"it lacks '{name}'")
          for name in ("prediction", "probability", "log_probs")),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(line, said, tmp_path):
    path = tmp_path / "validation_predictions.jsonl"
    odd = json.dumps({**GOOD, "text": "no line\u2028end"}, ensure_ascii=False)  # in the text of a row, as it is written
    path.write_text(f"{odd}\n{line}\n", encoding="utf-8")
    with pytest.raises(BlobError) as error:
        run_view(tmp_path)
    assert str(error.value).startswith(f"line 2 of {path} is damaged ({said}") and "\n" not in str(error.value)
    path.write_text(odd, encoding="utf-8")
    assert len(run_view(tmp_path).predictions[0].rows) == 1


def test_a_damaged_line_of_summaries_is_named(tmp_path):
    path = tmp_path / "generated_predictions.jsonl"
    path.write_text('{"id": 1, "summary": "s"}\n{"id": 2, "uncertainty": {"dissimilarity": "much"}}\n')
    with pytest.raises(BlobError, match=f"line 2 of {path} is damaged"):
        run_view(tmp_path)


def test_texts_that_have_changed_since_the_run_are_named(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "t"}\n')
    (tmp_path / "run_settings.json").write_text(json.dumps({"text_column": "dialogue", "validation_file": str(data)}))
    (tmp_path / "eval_generated_predictions.jsonl").write_text('{"id": 1, "summary": "s"}\n')
    with pytest.raises(
        BlobError, match=f"the texts of the run in {tmp_path} cannot be shown.* are in {data}: "
    ) as error:
        run_view(tmp_path)
    assert "_file_file" not in str(error.value)
