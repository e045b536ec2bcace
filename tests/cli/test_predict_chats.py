"""`blob predict` on prompts and conversations, with a causal adapter that brings its tokenizer and chat template."""

import csv
import json

import pytest
from helpers.adapters import one_line
from helpers.chat import causal
from helpers.models import tiny_tokenizer, words
from helpers.running import lines, predict
from helpers.sft import tokenizer
from transformers import BertConfig, BertForSequenceClassification

from blob_hf import BlobModel, Sampling
from blob_hf.cli.row_files import TextFile
from blob_hf.metrics.entailment import EntailmentEquivalence

SMALL = ["--num_samples", 3, "--batch_size", 2, "--max_new_tokens", 4]
QUESTIONS = words(9, longest=7, seed=2)


def messages(text, *more):
    return [{"role": "user", "content": text}, *more]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    model = causal("llama")
    base = model.get_base_model()
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    tokenizer().save_pretrained(folder / "adapter")
    model.unload().save_pretrained(folder / "base")
    write(folder / "chats.jsonl", [{"id": f"c{i}", "messages": messages(text)} for i, text in enumerate(QUESTIONS)])
    return folder


def test_conversations_of_a_file_are_answered_as_by_the_library(chat, tmp_path):
    found = BlobModel.from_pretrained(chat / "adapter").predict(
        [messages(text) for text in QUESTIONS], sampling=3, max_new_tokens=4, batch_size=4, stop_strings="w9"
    )
    output = tmp_path / "p.jsonl"
    paths = [chat / "adapter", "--input", chat / "chats.jsonl", "--output", output]
    assert predict(*paths, *SMALL, "--stop_strings", "w9") == 0
    rows = lines(output)
    assert [row["id"] for row in rows] == [f"c{i}" for i in range(9)]
    for i, row in enumerate(rows):
        assert row["messages"] == messages(QUESTIONS[i])
        assert (row["generated_text"], row["samples"]) == (found.texts[i], found.samples[i])
        assert row["sample_sets"] == found.sample_sets[i] and set(row["uncertainty"]) == set(found.uncertainty)
        for name, value in row["uncertainty"].items():
            assert value == pytest.approx(found.uncertainty[name][i], rel=1e-3, abs=1e-4)
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) // 2])  # as after a kill
    assert predict(*paths, *SMALL, "--stop_strings", "w9") == 0 and output.read_bytes() == whole
    assert predict(*paths, *SMALL) == 2  # other settings
    table = tmp_path / "p.csv"
    assert predict(*paths[:3], "--output", table, *SMALL, "--stop_strings", "w9") == 0
    with table.open(newline="") as file:
        flat = list(csv.DictReader(file))
    assert [json.loads(row["messages"]) for row in flat] == [row["messages"] for row in rows]
    assert [row["samples_2"] for row in flat] == [row["samples"][1] for row in rows]


@pytest.mark.slow
def test_the_column_is_that_of_the_training(chat, tmp_path):
    expected = BlobModel.from_pretrained(chat / "adapter").predict(
        [messages(text) for text in QUESTIONS[:3]], sampling=2, max_new_tokens=4
    )
    answer = {"role": "assistant", "content": "w7"}
    asked = [f"[SEP] user {text} [SEP] assistant" for text in QUESTIONS[:3]]
    for number, rows in enumerate((
        [{"prompt": messages(text), "completion": [answer]} for text in QUESTIONS[:3]],
        [{"prompt": text, "completion": "w7", "text": "w8"} for text in asked],
        [{"messages": messages(text, answer), "source": "w8"} for text in QUESTIONS[:3]],
        [{"question": text, "text": "w8"} for text in asked],
    )):  # fmt: skip
        output = tmp_path / f"{number}.jsonl"
        own = ["--text_columns", "question"] if "question" in rows[0] else []
        paths = ["--input", write(tmp_path / "rows.jsonl", rows), "--output", output]
        assert predict(chat / "adapter", *paths, *own, "--num_samples", 2, "--max_new_tokens", 4) == 0
        assert [row["generated_text"] for row in lines(output)] == expected.texts


@pytest.mark.slow
def test_an_nli_model_says_what_means_the_same(chat, tmp_path):
    labels = {0: "entailment", 1: "other"}
    config = BertConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, id2label=labels)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "nli")
    tiny_tokenizer().save_pretrained(tmp_path / "nli")
    found = BlobModel.from_pretrained(chat / "adapter").predict(
        [messages(text) for text in QUESTIONS], sampling=Sampling(3), max_new_tokens=4,
        equivalence=EntailmentEquivalence(str(tmp_path / "nli")),
    )  # fmt: skip
    paths = ["--input", chat / "chats.jsonl", "--output", tmp_path / "p.jsonl", "--equivalence", tmp_path / "nli"]
    assert predict(chat / "adapter", *paths, *SMALL) == 0
    for i, row in enumerate(lines(tmp_path / "p.jsonl")):
        assert row["sample_sets"] == found.sample_sets[i]
        assert row["uncertainty"]["eigv"] == pytest.approx(found.uncertainty["eigv"][i], rel=1e-3)


def test_mistakes_are_one_line_and_nothing_is_written(chat, tmp_path, capsys):
    good = {"messages": messages("w4")}
    for rows, own, message in (
        ([good, {"messages": []}], [], "the conversation of row 1 is empty"),
        ([good, {"messages": None}], [], "the messages of row 1 is neither a text nor a list of messages"),
        ([{"messages": [{"role": "user"}]}], [], "message 0 of row 0 has no content"),
        ([{"prompt": "w4"}, {"prompt": None}], [], "row 1 of input has no text in column 'prompt'"),
        ([{**good, "tools": [{"name": "w5"}]}], [], "row 0 has tools"),
        ([good], ["--equivalence", "nli", "--num_samples", 1], "--equivalence compares two or more sampled answers"),
        ([good], ["--stop_strings", ""], "stop_strings must be texts that are not empty"),
    ):
        source = write(tmp_path / "rows.jsonl", rows)
        output = tmp_path / "p.jsonl"
        assert predict(chat / "adapter", "--input", source, "--output", output, *SMALL, "--overwrite_output", *own) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and message in error[0], error
        assert not output.exists()
    two = write(tmp_path / "two.jsonl", [{"prompt": "w4", "completion": "w5"}])
    assert TextFile.survey(str(two), prompts=True).columns == ("prompt",)
    one_line("several columns could be the texts: prompt, completion", lambda: TextFile.survey(str(two)))
