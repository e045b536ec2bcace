"""`blob predict` on files without labels, against what the scripts measured with the same adapter and samples."""

import csv
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from helpers.adapters import trained
from helpers.models import randomize_b, tiny_tokenizer, words
from helpers.running import GLUE, ROOT, SUMMARIZATION, lines, predict, run_script, thorough
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from transformers import AutoModelForSequenceClassification

from blob_hf import BlobModel, Sampling, get_lora_model
from blob_hf.cli.row_files import RowFile, TextFile
from blob_hf.data import demo
from blob_hf.utils.errors import BlobError

QUICK = ["--demo", "--max_steps", 3, "--use_cpu", "true", "--disable_tqdm", "true", "--compare_base", "false"]


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
    assert len(rows) == len(expected) == 20 and [row["id"] for row in rows] == list(range(20))
    for row, own in zip(rows, expected, strict=True):
        probabilities = list(row["probabilities"].values())
        np.testing.assert_allclose(probabilities, np.exp(own["log_probs"]), rtol=1e-4)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert row["entropy"] == pytest.approx(-sum(p * np.log(p) for p in probabilities), rel=1e-4)
    assert max(row["epistemic"] for row in rows) > 0


def test_mistakes_are_one_line_and_nothing_is_written(classifier, tmp_path, capsys):
    two = tmp_path / "two.csv"
    two.write_text("question,answer\na,b\n")
    for arguments, message in (
        ([classifier / "run", "--input", two], "several columns could be the texts: question, answer"),
        ([classifier / "run", "--input", two, "--text_columns", "reply"], "no column 'reply'"),
        ([tmp_path, "--input", classifier / "texts.jsonl"], "expected a folder or Hub repo"),
        ([classifier / "run", "--input", tmp_path / "gone.csv"], "does not exist"),
        ([classifier / "run", "--input", classifier / "texts.jsonl", "--num_samples", -1], "num_samples must be >= 0"),
        ([classifier / "run", "--input", classifier / "texts.jsonl", "--coverage", 0.5], "needs a --calibration_file"),
        ([classifier / "run", "--input", classifier / "texts.jsonl", "--batch_size", 0], "batch_size must be >= 1"),
        (
            [classifier / "run", "--input", classifier / "texts.jsonl", "--equivalence", "nli"],
            "--equivalence is for models that write; .* tells classes apart",
        ),
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
        assert (row["generated_text"], row["samples"]) == (expected["summary"], expected["samples"])
        for name, value in row["uncertainty"].items():
            assert value == pytest.approx(expected["uncertainty"][name], rel=1e-3, abs=1e-5)


def test_the_script_writes_summaries_of_dialogues_without_references(monkeypatch, tmp_path, capsys):
    dialogues = [{"dialogue": row["dialogue"], "summary": ""} for row in lines(demo.SUMMARIZATION_FILES["test"])[:3]]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    own = ["--eval_samples", 2, "--do_train", "--do_predict", "--test_file", tmp_path / "new.jsonl"]
    own += ["--max_target_length", 16, "--output_dir", tmp_path / "run"]
    assert run_script(monkeypatch, SUMMARIZATION, *QUICK, *own) == 0
    rows = lines(tmp_path / "run" / "generated_predictions.jsonl")
    assert [(row["references"], len(row["samples"])) for row in rows] == [([], 2)] * 3
    assert all(row["summary"] and row["uncertainty"] for row in rows)
    assert not any("rouge" in key for row in rows for key in [*row, *json.dumps(row).split('"')])
    results = json.loads((tmp_path / "run" / "predict_results.json").read_text())
    assert not any("rouge" in name or "nll" in name for name in results) and results["predict_num_samples"] == 2
    assert "test: 3 summaries are written; without references they have no ROUGE and no NLL" in capsys.readouterr().out


# ----- a tiny adapter and a file of many rows -----------------------------------------------------------------------

SMALL = ["--num_samples", 2, "--batch_size", 2]  # blocks of 8 rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    trained("bert", folder / "base", init_eps=0.9).save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")
    with (folder / "new.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text", "score"])
        rows.writerows([f"r{i}", text if i else f'"a", \n{text}', i] for i, text in enumerate(words(30)))
    return folder


def run_tiny(tiny, output, *more, adapter="adapter", source="new.csv"):
    paths = [tiny / adapter, "--input", tiny / source, "--output", output]
    return predict(*paths, "--text_columns", "text", *SMALL, *more)


def test_plain_lora_is_the_one_network_that_it_is(tiny, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(tiny / "base")
    lora = get_lora_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))
    randomize_b(lora, 30.0)  # under which even a fresh, small std would show
    lora.save_pretrained(tmp_path / "plain")
    plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "plain", num_labels=3).eval()
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    assert run_tiny(tiny, tmp_path / "p.jsonl", adapter=tmp_path / "plain") == 0
    rows = lines(tmp_path / "p.jsonl")
    texts = pd.read_csv(tiny / "new.csv")["text"].tolist()
    for row, text in zip(rows, texts, strict=True):
        inputs = tiny_tokenizer()(text, return_tensors="pt")
        expected = plain(input_ids=inputs["input_ids"]).logits.softmax(-1)[0].tolist()
        assert list(row["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
        assert row["epistemic"] == pytest.approx(0, abs=1e-6)


def test_rows_are_the_librarys_answers(tiny, tmp_path):
    texts = pd.read_csv(tiny / "new.csv")["text"].tolist()
    found = BlobModel.from_pretrained(tiny / "adapter").predict(texts, sampling=Sampling(2), batch_size=5)
    threshold = float(np.median(found.entropy))
    assert run_tiny(tiny, tmp_path / "p.jsonl", "--abstain_above", threshold) == 0
    rows = lines(tmp_path / "p.jsonl")
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(30)]
    assert [row["text"] for row in rows] == texts and texts[0].startswith('"a", \n')
    for i, row in enumerate(rows):
        assert row["label"] == found.labels[i] and row["abstain"] is bool(found.entropy[i] > threshold)
        assert row["probability"] == pytest.approx(found.confidence[i], abs=1e-5)
        assert list(row["probabilities"].values()) == pytest.approx(found.probabilities[i].tolist(), abs=1e-5)
        for name in ("entropy", "aleatoric", "epistemic"):
            assert row[name] == pytest.approx(getattr(found, name)[i], abs=1e-5)
    assert {row["abstain"] for row in rows} == {True, False}


def test_a_table_has_the_same_rows_flat(tiny, tmp_path):
    assert run_tiny(tiny, tmp_path / "p.jsonl") == run_tiny(tiny, tmp_path / "p.csv") == 0
    assert run_tiny(tiny, tmp_path / "p.tsv", "--abstain_above", 0.9) == 0
    nested = lines(tmp_path / "p.jsonl")
    for kind in ("csv", "tsv"):
        with (tmp_path / f"p.{kind}").open(newline="") as file:
            flat = list(csv.DictReader(file, delimiter="," if kind == "csv" else "\t"))
        assert len(flat) == 30
        for row, own in zip(flat, nested, strict=True):
            assert (row["id"], row["text"], row["label"]) == (own["id"], own["text"], own["label"])
            assert float(row["entropy"]) == own["entropy"]
            assert float(row["probabilities_LABEL_1"]) == own["probabilities"]["LABEL_1"]
    assert flat[0]["abstain"] in ("true", "false") and "abstain" not in nested[0]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_stopped_run_goes_on_after_its_last_complete_row(tiny, tmp_path, kind):
    whole, output = tmp_path / f"whole.{kind}", tmp_path / f"p.{kind}"
    assert run_tiny(tiny, whole) == 0
    expected = whole.read_bytes()
    assert run_tiny(tiny, output) == 0 and output.read_bytes() == expected
    start = 0 if kind == "jsonl" else expected.index(b"\n") + 1
    for kept in (start, start + 20, len(expected) // 2, len(expected) - 1, len(expected)):  # mostly within a row
        output.write_bytes(expected[:kept])
        assert run_tiny(tiny, output) == 0
        assert output.read_bytes() == expected


def test_only_missing_blocks_are_predicted(tiny, tmp_path, monkeypatch):
    append, sizes = RowFile.append, []

    def stops(self, rows):
        sizes.append(len(rows))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        append(self, rows)

    monkeypatch.setattr(RowFile, "append", stops)
    assert run_tiny(tiny, tmp_path / "p.jsonl") == 130
    assert len(lines(tmp_path / "p.jsonl")) == 16  # are on the disk
    assert run_tiny(tiny, tmp_path / "p.jsonl") == 0
    assert sizes == [8, 8, 8, 8, 6]


def test_an_output_of_something_else_is_refused_and_untouched(tiny, tmp_path, capsys):
    output = tmp_path / "p.jsonl"
    assert run_tiny(tiny, output) == 0
    before = output.read_bytes()
    other = BlobModel.from_pretrained(tiny / "adapter")
    next(p for name, p in other.named_parameters() if ".lora_B." in name).data.add_(1.0)
    other.save_pretrained(tiny / "other")
    (tiny / "more.csv").write_text("text\nw4\n")
    capsys.readouterr()
    for changes, options, message in (
        ({}, ["--seed", 1], "of other settings (seed changed)"), ({"adapter": "other"}, [], "(adapter changed)"),
        ({"source": "more.csv"}, [], "(input changed)"),
    ):  # fmt: skip
        assert run_tiny(tiny, output, *options, **changes) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and message in error[0] and "--overwrite_output" in error[0]
    assert output.read_bytes() == before
    assert run_tiny(tiny, output, "--seed", 1, "--overwrite_output") == 0 and output.read_bytes() != before
    (tmp_path / "mine.jsonl").write_text("{}\n")
    assert run_tiny(tiny, tmp_path / "mine.jsonl") == 2
    assert "that blob predict did not write" in capsys.readouterr().err


def test_a_coverage_answers_that_share_of_the_calibration_rows(tiny, tmp_path):
    options = ["--coverage", 0.7, "--calibration_file", tiny / "new.csv"]
    assert run_tiny(tiny, tmp_path / "p.jsonl", *options) == 0
    assert sum(not row["abstain"] for row in lines(tmp_path / "p.jsonl")) == 21
    expected = (tmp_path / "p.jsonl").read_bytes()
    (tmp_path / "p.jsonl").write_bytes(expected[:500])
    assert run_tiny(tiny, tmp_path / "p.jsonl", *options) == 0 and (tmp_path / "p.jsonl").read_bytes() == expected


# ----- input files ------------------------------------------------------------------------------------------------


def test_texts_are_found_in_files_of_every_format(tmp_path):
    rows = [{"idx": i, "text": text, "score": 0.5, "label": "x"} for i, text in enumerate(words(3))]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    body = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("b.json", "b.jsonl"):
        (tmp_path / name).write_text(body + "\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(body)
    (tmp_path / "d.tsv").write_text("\ufeffidx\ttext\n" + "".join(f"{r['idx']}\t{r['text']}\n" for r in rows))
    for name in ("a.json", "b.json", "b.jsonl", "c.jsonl.gz", "d.tsv"):
        found = TextFile.survey(str(tmp_path / name))
        assert (found.columns, found.id_column, found.count) == (("text",), "idx", 3)
        assert [str(row["id"]) for row in found.rows(1)] == ["1", "2"]
        assert [row["text"] for row in found.rows()] == words(3)


def test_rows_that_cannot_be_read_are_named(tmp_path):
    for name, body, message in (
        ("a.csv", "text,b\nw4,1\nw5\n", "a.csv: line 3 has 1 cells, but the header has 2"),
        ("b.csv", "text\n", "no rows"),
        ("a.jsonl", '{"text": "w4"}\n{"text"', "line 2 is not JSON"),
        ("b.jsonl", '{"text": "w4"}\n3\n', "not a JSON object"),
        ("c.jsonl", '{"text": "w4"}\n{"text": null}\n', "row 1 of input has no text in column 'text'"),
        ("a.txt", "w4", "--input must be a .csv"),
    ):
        (tmp_path / name).write_text(body)
        with pytest.raises(BlobError, match=message):
            TextFile.survey(str(tmp_path / name))
    (tmp_path / "pairs.csv").write_text("a,b,c\nw4,w5,w6\n")
    with pytest.raises(BlobError, match="one or two columns, got a, b, c"):
        TextFile.survey(str(tmp_path / "pairs.csv"), ["a", "b", "c"])


# ----- real processes ---------------------------------------------------------------------------------------------


def command(tiny, output, *launcher):
    module = [*launcher, "-m", "blob_hf", "predict", tiny / "adapter", "--input", tiny / "new.csv", "--output", output]
    return [str(part) for part in [*module, "--text_columns", "text", *SMALL]]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [thorough("accelerate"), "torchrun"])
def test_launchers_write_the_file_of_one_process(tiny, tmp_path, launcher):
    """torchrun starts two; accelerate's own, on a CPU without MPI, one, whatever it is told."""
    assert run_tiny(tiny, tmp_path / "one.jsonl") == 0
    start = {
        "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }[launcher]
    two, environment = tmp_path / "two.jsonl", {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(tiny, two, *start), env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert two.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    again = subprocess.run(
        [*command(tiny, two, *start), "--seed", "1"], env=environment, cwd=tmp_path, capture_output=True
    )
    assert again.returncode != 0 and again.stderr.count(b"error: ") == 1


@pytest.mark.slow
def test_a_killed_run_goes_on(tiny, tmp_path):
    assert run_tiny(tiny, tmp_path / "one.jsonl") == 0
    output = tmp_path / "killed.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command(tiny, output, sys.executable), env=environment, cwd=tmp_path)
    while process.poll() is None and not (output.is_file() and output.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run_tiny(tiny, output) == 0
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
