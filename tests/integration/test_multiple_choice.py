"""run_multiple_choice_blob.py as a user runs it, on a tiny Llama and own files."""

import importlib.util
import json
import random

import pytest
import torch
from helpers.running import first_code, lines, predict, run_experiment, run_script
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blob_hf import BlobModel
from blob_hf.baselines.laplace import library_is_there

SCRIPT = "run_multiple_choice_blob.py"
COLOURS, SHAPES = ["red", "green", "blue", "black"], ["circle", "square", "line", "dot", "cone"]
PROMPT = "Return the label of the correct answer for the question below. Question: Choices: Answer:"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model, and questions of three and four choices that name the answer; other ones about shapes."""
    folder = tmp_path_factory.mktemp("questions")
    words = [*PROMPT.split(), *COLOURS, *SHAPES, "which", "is", *"ABCDE", *(f"{letter})" for letter in "ABCDE")]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["[PAD]", "[UNK]", *words]))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    draw = random.Random(0)

    def questions(words, count):
        for _ in range(count):
            choices = draw.sample(words, draw.choice((3, 4)))
            label = draw.randrange(len(choices))
            yield {
                "id": f"q{draw.random()}",
                "question": f"which is {choices[label]}",
                "choices": choices,
                "label": label,
            }

    for name, words, count in (("train", COLOURS, 64), ("validation", COLOURS, 20), ("ood", SHAPES, 12)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, questions(words, count))))
    unlabelled = [{"question": "which is red", "choices": ["red", "blue"]}]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, unlabelled)))
    return folder


def flags(world, *more):
    return [
        "--model_name_or_path", world / "base", "--train_file", world / "train.jsonl", "--validation_file",
        world / "validation.jsonl", "--test_file", world / "test.jsonl", "--use_cpu", "true", "--disable_tqdm", "true",
        "--report_to", "none", "--save_strategy", "no", "--max_steps", "8", "--learning_rate", "5e-3", "--max_length",
        "64", "--eval_samples", "2", *more,
    ]  # fmt: skip


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_a_run_and_its_evaluation_again(world, scoring, monkeypatch, tmp_path, capsys):
    shifted = ["--ood_file", f"shapes={world / 'ood.jsonl'}", "--temperature_scaling", "true"]
    how = ["--scoring", scoring, *shifted]
    assert run_script(monkeypatch, SCRIPT, *flags(world, *how, "--output_dir", tmp_path / "run")) == 0
    printed = capsys.readouterr().out
    assert "N=2 (samples)" in printed and "out of distribution: shapes (12 examples)" in printed
    results = read(tmp_path / "run" / "eval_results.json")
    assert 0 <= results["eval_accuracy"] <= 1 and results["eval_nll"] > 0
    assert 0 <= read(tmp_path / "run" / "ood_shapes_results.json")["ood_shapes_entropy_auroc"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "validation_predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and {row["prediction"] for row in rows} <= set("ABCD")
    for row in rows:  # no probability for a choice that a question does not have
        assert all(score < -1e8 for score in row["log_probs"][len(row["choices"]) :])
    assert "1 rows without labels were predicted" in printed
    again = flags(world, *shifted[:2], "--do_eval", "--adapter_name_or_path", tmp_path / "run")
    assert run_script(monkeypatch, SCRIPT, *again, "--output_dir", tmp_path / "again") == 0
    found = read(tmp_path / "again" / "eval_results.json")
    assert found["eval_nll"] == pytest.approx(results["eval_nll"], rel=1e-5)
    assert BlobModel.from_pretrained(tmp_path / "run").companion("choices").scoring == scoring
    used = first_code(tmp_path / "run" / "README.md")["found"]
    assert used.probabilities.shape == (1, 4) and used.probabilities[0, 2:].tolist() == [0, 0]
    assert used.sample_probabilities.shape[1] == 2


def test_plain_lora_answers_a_file_with_its_temperature(world, monkeypatch, tmp_path):
    how = ["--method", "lora", "--temperature_scaling", "true", "--output_dir", tmp_path / "run"]
    assert run_script(monkeypatch, SCRIPT, *flags(world, *how)) == 0
    asked = world / "validation.jsonl"
    assert predict(tmp_path / "run", "--input", asked, "--output", tmp_path / "out.jsonl") == 0
    temperature = read(tmp_path / "run" / "temperature.json")["mean"]
    rows = lines(tmp_path / "run" / "validation_predictions.jsonl")
    expected = (torch.tensor([row["mean_log_probs"] for row in rows]) / temperature).softmax(-1)
    found = lines(tmp_path / "out.jsonl")
    for row, own in zip(found, expected, strict=True):
        assert torch.tensor(list(row["probabilities"].values())).allclose(own, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mapie") is None, reason="MAPIE is not installed")
def test_decisions_on_choices_are_those_of_predict_and_of_the_command(world, monkeypatch, tmp_path):
    flags_ = flags(world, "--scoring", "text", "--conformal_alpha", "0.3", "--calibration_samples", "20")
    assert run_script(monkeypatch, SCRIPT, *flags_, "--output_dir", tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "validation_predictions.jsonl").read_text().splitlines()]
    results = read(tmp_path / "run" / "eval_conformal_results.json")
    assert results["eval_coverage"] == sum(row["label_name"] in row["prediction_set"] for row in rows) / len(rows)
    assert all(set(row["prediction_set"]) <= set("ABCDE"[: len(row["choices"])]) for row in rows)
    questions = [json.loads(line) for line in (world / "validation.jsonl").read_text().splitlines()]
    found = BlobModel.from_pretrained(tmp_path / "run").predict(
        [{name: row[name] for name in ("question", "choices")} for row in questions], sampling=2
    )
    assert found.prediction_sets == [row["prediction_set"] for row in rows]
    for name in ("p.jsonl", "p.csv"):
        where = ["--input", world / "validation.jsonl", "--output", tmp_path / name, "--num_samples", "2"]
        assert predict(tmp_path / "run", *where) == 0
    written = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == [row["id"] for row in questions]
    assert [(row["prediction_set"], row["abstain"]) for row in written] == [
        (row["prediction_set"], row["abstain"]) for row in rows
    ]
    assert [row["label"] for row in written] == found.labels
    assert predict(tmp_path / "run", *where[:2], "--output", tmp_path / "q.jsonl", "--num_beams", "2") == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ensemble", "ivon"])
def test_every_method_that_trains_answers(world, method, monkeypatch, tmp_path):
    more = ["--method", method, "--ensemble_size", "2"] if method == "ensemble" else ["--method", method]
    assert run_script(monkeypatch, SCRIPT, *flags(world, *more, "--output_dir", tmp_path)) == 0
    assert read(tmp_path / "eval_results.json")["eval_nll"] > 0


@pytest.mark.slow
def test_methods_that_are_fitted_to_lora_answer(world, monkeypatch, tmp_path):
    lora = ["--method", "lora", "--scoring", "text", "--output_dir", tmp_path / "lora"]
    assert run_script(monkeypatch, SCRIPT, *flags(world, *lora)) == 0
    mean = read(tmp_path / "lora" / "eval_results.json")["eval_nll"]
    for method in ("tfb", *(["laplace"] if library_is_there() else [])):
        more = ["--method", method, "--adapter_name_or_path", tmp_path / "lora", "--output_dir", tmp_path / method]
        assert run_script(monkeypatch, SCRIPT, *flags(world, *more)) == 0
        assert read(tmp_path / method / "eval_results.json")["eval_mean_nll"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.slow
def test_the_experiment_runs_the_grid(world, tmp_path):
    grid = ["--tasks", "arc_easy", "--seeds", "1", "2", "--methods", "blob", "lora", "--launcher", "fork"]
    passed = flags(world, "--output_dir", tmp_path)
    assert run_experiment("multiple_choice", *grid, *passed) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| arc_easy | blob, N=2 | 2 |" in text and "| arc_easy | published BLoB, Llama-2-7B [C] | 3 | 84.60" in text


@pytest.mark.parametrize(
    "more, message",
    [
        (["--task_name", "arc"], "task_name must be one of arc_challenge, arc_easy"),
        (["--scoring", "words"], "scoring"),
        (["--train_file", "missing.jsonl"], "--train_file missing.jsonl does not exist"),
        (["--max_train_samples", "0"], "must be >= 1"),
        (["--train_file", "{test}"], "the train split has no labels"),
        (["--temperature_scaling", "true", "--calibration_file", "{test}"], "the calibration split has no labels"),
        (["--ood_file", "missing.jsonl"], "--ood_file missing.jsonl does not exist"),
    ],
)
def test_mistakes_are_one_line(world, more, message, monkeypatch, tmp_path, capsys):
    more = [str(world / "test.jsonl") if part == "{test}" else part for part in more]
    code = run_script(monkeypatch, SCRIPT, *flags(world, *more, "--output_dir", tmp_path / "out"))
    shown = capsys.readouterr()
    assert code == 2 and message in shown.err and "Traceback" not in shown.err


def test_a_saved_adapter_does_not_answer_what_it_has_no_letters_for(world, monkeypatch, tmp_path, capsys):
    wide = tmp_path / "wide.jsonl"
    wide.write_text(json.dumps({"question": "which is red", "choices": [*COLOURS, "dot"], "label": 0}))
    assert run_script(monkeypatch, SCRIPT, *flags(world, "--output_dir", tmp_path / "run")) == 0
    again = ["--do_eval", "--adapter_name_or_path", tmp_path / "run", "--validation_file", wide]
    assert run_script(monkeypatch, SCRIPT, *flags(world, *again, "--output_dir", tmp_path / "out")) == 2
    assert "a question has 5 choices, but the adapter answers with at most 4: A, B, C, D" in capsys.readouterr().err
