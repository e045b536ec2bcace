"""`blob distil` on files: what comes out, what is asked again, what is refused, one process and two."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers.adapters import saved_base, trained
from helpers.models import randomize_b, tiny_tokenizer, words
from helpers.running import ROOT, run_blob
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file

from blob_hf import BlobConfig, BlobModel, get_blob_model, get_lora_model
from blob_hf.baselines import MapState, Temperatures
from blob_hf.metrics.calibration import calibration_metrics

NAMES = ["no", "yes", "maybe"]
QUICK = [
    "--num_samples", 4, "--max_steps", 30, "--learning_rate", 1e-2, "--batch_size", 3, "--text_columns", "text",
    "--per_device_train_batch_size", 8, "--disable_tqdm",
]  # fmt: skip


def distil(*arguments):
    """Exit code of the command."""
    return run_blob("distil", *arguments)


def classifier(folder, **config):
    """A tiny adapter whose head is trained, with named classes."""
    torch.manual_seed(0)
    base = saved_base("bert", folder / "base")
    base.config.id2label, base.config.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
    own = BlobConfig(target_modules=["query", "value"], task_type="SEQ_CLS", r=4, init_eps=1.0, **config)
    model = get_blob_model(base, own)
    randomize_b(model, 1.0)
    dict(model.named_parameters())["base_model.model.classifier.modules_to_save.default.weight"].data.normal_()
    return model.eval()


def csv(path, texts, labels=None):
    rows = [f"{text},{label}" for text, label in zip(texts, labels, strict=True)] if labels else texts
    path.write_text("\n".join(["text,label" if labels else "text", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model = classifier(folder)
    model.set_companion(Temperatures(1.7, 1.1))
    model.save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")
    texts = words(20, seed=1)
    csv(folder / "train.csv", texts[:13], [NAMES[i % 3] for i in range(13)])
    csv(folder / "more.csv", texts[13:])
    csv(folder / "test.csv", words(9, seed=2), [NAMES[i % 2] for i in range(9)])
    return folder


def shards(folder):
    return {file.name: load_file(file) for file in (folder / "teacher").glob("*.safetensors")}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name][key]) for name, own in one.items() for key, tensor in own.items()
    )


def test_a_classifier_is_distilled_measured_and_served_by_plain_peft(tiny, tmp_path, capsys):
    data = ["--data", tiny / "train.csv", tiny / "more.csv", "--eval_data", tiny / "test.csv"]
    assert distil(tiny / "adapter", *data, "--output", tmp_path / "s", *QUICK) == 0
    assert "20 rows: the teacher (method blob, N=4) answered 20 of them now" in capsys.readouterr().out
    # the teacher's answers are those of `predict`, its temperature among them
    teacher, texts = BlobModel.from_pretrained(tiny / "adapter"), [*words(20, seed=1)]
    expected = teacher.predict(texts, sampling=4).probabilities
    found = {tuple(row) for shard in shards(tmp_path / "s").values() for row in shard["teacher_log_probs"].tolist()}
    for row in np.log(expected):
        assert min(np.abs(row - np.array(other)).max() for other in found) < 1e-4
    # what was lost, against the metrics of answers from outside
    results = json.loads((tmp_path / "s" / "distil_results.json").read_text())
    student = BlobModel.from_pretrained(tmp_path / "s")
    test, labels = words(9, seed=2), np.array([i % 2 for i in range(9)])
    answers = {"teacher": (teacher, 4), "teacher_mean": (teacher, 0), "student": (student, 10)}
    for name, (model, samples) in answers.items():  # of a point all samples are the point
        own = calibration_metrics(np.log(model.predict(test, sampling=samples).probabilities), labels)
        assert results["evaluation"][name] == pytest.approx(own, rel=1e-4)
    nll = {name: results["evaluation"][name]["nll"] for name in answers}
    if nll["teacher"] < nll["teacher_mean"]:
        share = (nll["teacher_mean"] - nll["student"]) / (nll["teacher_mean"] - nll["teacher"])
        assert results["evaluation"]["kept"]["nll"] == pytest.approx(share)
    far = np.abs(teacher.predict(texts, sampling=0).probabilities - expected).mean()
    assert np.abs(student.predict(texts, sampling=0).probabilities - expected).mean() < 0.7 * far
    assert student.method == "distilled" and not student.has_posterior
    # plain PEFT
    plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "s", num_labels=3).eval()
    tokens = tiny_tokenizer()(test, return_tensors="pt", padding=True)
    with torch.no_grad():
        own = plain(**tokens).logits.softmax(-1).numpy()
    np.testing.assert_allclose(student.predict(test, sampling=0).probabilities, own, atol=1e-5)
    card = (tmp_path / "s" / "README.md").read_text()
    for part in ("distilled LoRA adapter", str(tiny / "adapter"), "| rows | 20 |", "teacher, N=4", "kept of the gain",
                 "AutoPeftModelForSequenceClassification"):  # fmt: skip
        assert part in card, part
    assert "posterior_samples" not in card


@pytest.mark.slow
def test_the_second_run_reads_what_the_first_has_asked(tiny, tmp_path, capsys):
    run = [tiny / "adapter", "--data", tiny / "train.csv", *QUICK, "--output"]
    assert distil(*run, tmp_path / "a") == 0
    first, weights = shards(tmp_path / "a"), load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(first) == 2 and "answered 13 of them now" in capsys.readouterr().out
    next(iter((tmp_path / "a" / "teacher").glob("*"))).unlink()
    assert distil(*run, tmp_path / "a") == 0
    assert re.search(r"answered (1|12) of them now", capsys.readouterr().out)
    again = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert same(first, shards(tmp_path / "a")) and all(torch.equal(weights[name], again[name]) for name in weights)
    assert distil(*run, tmp_path / "a", "--seed", 1) == 0  # other samples
    assert "answered 13 of them now" in capsys.readouterr().out and len(shards(tmp_path / "a")) == 4


def test_mistakes_are_one_line(tiny, tmp_path, capsys):
    lora = classifier(tmp_path / "m")
    plain = get_lora_model(lora.merge_and_unload(), BlobConfig(target_modules=["query"]).to_lora())
    plain.save_pretrained(tmp_path / "lora")
    plain.set_companion(MapState(0.1))
    plain.save_pretrained(tmp_path / "map")
    two = tmp_path / "two.csv"
    two.write_text("question,answer\na,b\n")
    csv(tmp_path / "odd.csv", ["w4", "w5"], ["no", "perhaps"])
    capsys.readouterr()
    data, adapter, out = ["--data", tiny / "train.csv"], tiny / "adapter", tmp_path / "out"
    for teacher, options, message in (
        (tmp_path / "lora", data, "method lora: one network, without samples to distil"),
        (tmp_path / "map", data, "method map: one network"),
        (adapter, [*data, "--r", 0], "--r must be >= 1, got 0"),
        (adapter, [*data, "--num_samples", 0], "--num_samples must be >= 1, got 0"),
        (adapter, [*data, "--max_steps", 0], "max_steps must be >= 1"),
        (adapter, [*data, "--target_modules", "nowhere"], "match no layer"),
        (adapter, ["--data", two], "data split has no column 'text'"),
        (adapter, ["--data", tmp_path / "gone.csv"], "--data .*gone.csv does not exist"),
        (adapter, ["--data", tiny / "train.csv", two], "no column 'text'"),
        (adapter, [*data, "--eval_data", tiny / "more.csv"], "eval_data split has no column 'label'"),
        (adapter, [*data, "--eval_data", tmp_path / "odd.csv"], "unknown class 'perhaps'"),
        (adapter, [*data, "--learning_rate", 0], "learning_rate must be > 0"),
    ):
        assert distil(teacher, *options, "--output", out, *(QUICK[:2] if "--num_samples" not in options else []),
                      "--text_columns", "text") == 2, message  # fmt: skip
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and re.search(message, error[0]), (message, error)
    assert not (out / "adapter_config.json").exists() and not shards(out)
    for where, message in ((adapter, "own folder"), (tmp_path / "lora", "blob distil did not write")):
        assert distil(adapter, *data, "--output", where) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_summarizer_learns_its_own_texts_or_those_of_the_data(tmp_path):
    torch.manual_seed(0)
    model = trained("bart", tmp_path / "base", init_eps=0.9)
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    rows = [{"dialogue": a, "summary": b, "topic": "x"} for a, b in zip(words(5), words(5, 4, seed=1), strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", tmp_path / "rows.jsonl", "--num_samples", 2, "--max_steps", 3, "--max_new_tokens", 5]
    options += ["--prompt", "{dialogue} a", "--disable_tqdm", "--top_k", 8, "--batch_size", 2]
    for answers in ("data", "teacher"):
        out = tmp_path / answers
        measured = ["--eval_data", tmp_path / "rows.jsonl"] if answers == "data" else []
        assert distil(tmp_path / "adapter", *options, "--output", out, "--answers", answers, *measured) == 0
        written = torch.cat([shard["target"] for shard in shards(out).values()]).tolist()
        given = [token for row in rows for token in tiny_tokenizer()(row["summary"]).input_ids[:5]]
        assert (written == given) == (answers == "data")
        assert BlobModel.from_pretrained(out).method == "distilled"
    scores = json.loads((tmp_path / "data" / "distil_results.json").read_text())["evaluation"]
    assert set(scores["student"]) == {"nll", "token_accuracy"} and scores["rows"] == 5


# ----- real processes ---------------------------------------------------------------------------------------------


def command(tiny, output, *launcher):
    module = [*launcher, "-m", "blob_hf", "distil", tiny / "adapter", "--data", tiny / "train.csv", tiny / "more.csv"]
    return [str(part) for part in [*module, "--eval_data", tiny / "test.csv", "--output", output, *QUICK]]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_two_processes_ask_what_one_does_and_a_kill_loses_nothing(tiny, tmp_path):
    def run(output, *launcher):
        done = subprocess.run(
            command(tiny, output, sys.executable, *launcher), env=ENVIRONMENT, cwd=tmp_path, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(tmp_path / "one")
    two = run(tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert "answered 12 of them now" in two  # the other process the 8 of the other block
    expected = shards(tmp_path / "one")
    assert same(expected, shards(tmp_path / "two"))
    results = json.loads((tmp_path / "two" / "distil_results.json").read_text())
    assert results["evaluation"]["rows"] == 9
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(tiny, killed, sys.executable), env=ENVIRONMENT, cwd=tmp_path)
    while process.poll() is None and not any((killed / "teacher").glob("*.safetensors")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(killed)
    assert same(expected, shards(killed))
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "one", killed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
