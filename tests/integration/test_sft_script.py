"""`run_sft_blob.py` as a user runs it: trains, reports, saves mean and std, evaluates the saved adapter again."""

import json
import sys

import pytest
from helpers.models import words
from helpers.running import first_code, run_script
from helpers.sft import llama, tokenizer
from safetensors.torch import load_file

SFT = "run_sft_blob.py"
QUICK = [
    "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--per_device_train_batch_size", "4",
    "--eval_samples", "2", "--learning_rate", "1e-2", "--dtype", "float32", "--gradient_checkpointing", "false",
]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    pytest.importorskip("trl", reason="needs TRL: pip install 'blob_hf[trl]'")
    base = tmp_path / "base"
    llama().save_pretrained(base)
    tokenizer().save_pretrained(base)
    for seed, split in enumerate(("train", "validation")):
        rows = zip(words(12, seed=seed), words(12, seed=seed + 9), strict=True)
        lines = [json.dumps({"prompt": f"{prompt} ", "completion": completion}) for prompt, completion in rows]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def given(files, out="run"):
    return [
        "--model_name_or_path", files / "base", "--train_file", files / "train.jsonl", "--validation_file",
        files / "validation.jsonl", "--output_dir", files / out, *QUICK,
    ]  # fmt: skip


def test_a_run_leaves_its_adapter_and_report_and_is_evaluated_again(files, monkeypatch, capsys):
    assert run_script(monkeypatch, SFT, *given(files), "--max_steps", "3", "--packing", "true") == 0
    run = files / "run"
    results = json.loads((run / "eval_results.json").read_text())
    assert {"eval_nll", "eval_mean_nll", "eval_perplexity", "eval_mean_perplexity"} <= set(results)
    stds = load_file(run / "posterior_std.safetensors")
    assert len(stds) == len([name for name in load_file(run / "adapter_model.safetensors") if "lora_A" in name]) > 0
    assert "perplexity" in (run / "report.md").read_text() and (run / "README.md").is_file()
    assert "perplexity" in capsys.readouterr().out
    assert len(first_code(run / "README.md")["found"].samples[0]) == 2

    again = ["--do_eval", "--adapter_name_or_path", run]
    assert run_script(monkeypatch, SFT, *given(files, "again"), *again) == 0
    other = json.loads((files / "again" / "eval_results.json").read_text())
    assert other["eval_nll"] == pytest.approx(results["eval_nll"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "map", "mc_dropout", "ensemble", "scalabl", "ivon"])
def test_peers_train_on_texts(files, monkeypatch, method):
    assert run_script(monkeypatch, SFT, *given(files), "--max_steps", "2", "--method", method) == 0
    assert (files / "run" / "eval_results.json").is_file()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--target_modules", "q_proj", "lm_head"], "no adapter on lm_head"),
        (["--method", "laplace"], "method laplace predicts classes"),
        (["--loss_type", "dft"], "loss_type must be nll"),
        (
            ["--posterior_scale", "fit", "--calibration_file", "{other}"],
            "calibration: rows need the columns prompt and",
        ),
        (["--do_train", "--do_predict", "--test_file", "{other}"], "test: rows need the columns prompt and completion"),
    ],
)
def test_mistakes_are_one_line(files, monkeypatch, capfd, extra, message):
    (files / "other.jsonl").write_text(json.dumps({"question": "q", "label": 1}) + "\n")
    extra = [files / "other.jsonl" if part == "{other}" else part for part in extra]
    assert run_script(monkeypatch, SFT, *given(files), *extra) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list((files / "run").glob("adapter_*"))  # nothing was trained for it


def test_without_trl_one_line_says_what_to_install(monkeypatch, capfd):
    import importlib.util

    import blob_hf

    for name in [name for name in sys.modules if name.split(".")[0] == "trl" or name == "blob_hf.trainer.sft"]:
        monkeypatch.delitem(sys.modules, name)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "trl" else find(name, *more))
    assert run_script(monkeypatch, SFT, "--model_name_or_path", "any") == 2
    error = capfd.readouterr().err
    assert "error: supervised fine-tuning needs TRL: pip install 'blob_hf[trl]'" in error and "Traceback" not in error
    with pytest.raises(blob_hf.BlobError, match="needs TRL"):
        _ = blob_hf.BlobSFTTrainer
