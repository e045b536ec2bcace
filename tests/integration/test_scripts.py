"""The two scripts as a user runs them, on the embedded demo (shortened), and each user mistake."""

import json

import pandas as pd
import pytest
from helpers.running import GLUE, SUMMARIZATION
from helpers.running import run_script as run
from huggingface_hub import ModelCard
from peft import AutoPeftModelForSeq2SeqLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file

from blob_hf import BlobModel, cli
from blob_hf.data import demo

QUICK = ["--demo", "--eval_samples", "2", "--disable_tqdm", "true", "--use_cpu", "true"]
QUICK_GLUE = [
    *QUICK, "--max_steps", "6", "--kl_cycle_steps", "3", "--max_eval_samples", "40", "--compare_lora", "false",
]  # fmt: skip
QUICK_SUMMARIZATION = [
    *QUICK, "--max_steps", "4", "--kl_cycle_steps", "2", "--max_train_samples", "64", "--max_eval_samples", "4",
    "--max_predict_samples", "4", "--max_new_tokens", "12", "--compare_base", "false",
]  # fmt: skip


def read(path):
    return json.loads(path.read_text())


def test_a_run_that_overfits_says_when_it_was_best(monkeypatch, tmp_path, capsys):
    flags = [
        "--method", "lora", "--max_train_samples", "16", "--max_steps", "60", "--learning_rate", "2e-2",
        "--eval_strategy", "steps", "--eval_steps", "10", "--save_strategy", "no",
    ]  # fmt: skip
    assert run(monkeypatch, GLUE, *QUICK_GLUE, *flags, "--output_dir", tmp_path) == 0
    history = [row for row in read(tmp_path / "trainer_state.json")["log_history"] if "eval_nll" in row]
    best, last = min(history, key=lambda row: row["eval_nll"]), history[-1]
    assert last["eval_nll"] > 1.05 * best["eval_nll"]  # sixteen rows, many passes
    said = f"least at step {best['step']} of 60, {best['eval_nll']:.3g}, and ended at {last['eval_nll']:.3g}"
    assert said in capsys.readouterr().out and said in (tmp_path / "report.md").read_text()


def test_classification_leaves_every_artifact(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, GLUE, *QUICK_GLUE, "--compare_base", "true", "--output_dir", tmp_path) == 0
    printed = capsys.readouterr().out
    for shown in (
        "N=0 (posterior mean)",
        "N=2 (samples)",
        "accuracy",
        "ece",
        "nll",
        "brier",
        "before training",
        str(tmp_path),
    ):
        assert shown in printed
    results = read(tmp_path / "eval_results.json")
    for name in ("accuracy", "ece", "nll", "brier"):
        assert results[f"eval_{name}"] >= 0 and results[f"eval_mean_{name}"] >= 0
    for name in (
        "adapter_config.json", "README.md", "report.md", "train_results.json", "all_results.json", "trainer_state.json",
        "kl_history.csv", "plots/kl.png", "plots/reliability.png", "validation_predictions.jsonl", "run_settings.json",
    ):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 0, name
    assert pd.read_csv(tmp_path / "kl_history.csv")["step"].tolist() == [1, 2, 3, 4, 5, 6]
    mean, std = load_file(tmp_path / "adapter_model.safetensors"), load_file(tmp_path / "posterior_std.safetensors")
    assert set(std) == {name for name in mean if "lora_A" in name}
    assert "posterior_samples" in (tmp_path / "README.md").read_text()
    BlobModel.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="prior_std"):
        AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path))


@pytest.mark.slow
def test_the_report_says_what_the_kl_did_and_tells_shifted_data_from_own(monkeypatch, tmp_path, capsys):
    other = tmp_path / "letters.jsonl"
    other.write_text("".join(json.dumps({"text": f"{c} {c} {c}"}) + "\n" for c in "abcdefgh"))
    shifted = f"again={demo.CLASSIFICATION_FILES['validation']}"
    code = run(
        monkeypatch, GLUE, *QUICK_GLUE, "--ood_file", other, shifted, "--draw", "antithetic", "--eval_samples", "4",
        "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert code == 0
    folder, printed = tmp_path / "run", capsys.readouterr().out
    verdict = read(folder / "kl_verdict.json")
    assert f"KL verdict: {verdict['verdict']}" in printed and verdict["steps"] == 6 and verdict["sample_gap"] >= 0
    for text in (folder / "report.md", folder / "README.md"):
        assert f"KL verdict: {verdict['verdict']}" in text.read_text()
    for name in ("reliability", "confidence", "accuracy_rejection", "nll_by_samples", "posterior_std", "ood_letters"):
        assert (folder / "plots" / f"{name}.png").stat().st_size > 0
        assert f"plots/{name}.png" in (folder / "report.md").read_text()
    strange, again = read(folder / "ood_letters_results.json"), read(folder / "ood_again_results.json")
    assert 0 <= strange["ood_letters_mutual_information_auroc"] <= 1 and "ood_letters_accuracy" not in strange
    # the same data: it cannot be told from itself, and its metrics are those of the evaluation
    assert again["ood_again_mean_entropy_auroc"] == pytest.approx(0.5)
    assert again["ood_again_entropy_auroc"] == pytest.approx(0.5)
    results = read(folder / "eval_results.json")
    assert again["ood_again_nll"] == pytest.approx(results["eval_nll"], rel=1e-5)
    assert "out of distribution: letters (8 examples)" in printed
    assert "letters" not in str(ModelCard.load(folder / "README.md").data.eval_results)


def test_summarization_leaves_every_artifact(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, SUMMARIZATION, *QUICK_SUMMARIZATION, "--output_dir", tmp_path) == 0
    assert "rougeL" in capsys.readouterr().out
    for split, prefix in (("eval", "eval"), ("predict", "predict")):
        results = read(tmp_path / f"{split}_results.json")
        for name in ("rouge1", "rouge2", "rougeL", "nll"):
            assert results[f"{prefix}_{name}"] >= 0 and results[f"{prefix}_mean_{name}"] >= 0
    rows = [json.loads(line) for line in (tmp_path / "generated_predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all(len(row["references"]) == 3 and len(row["samples"]) == 2 and row["mean_summary"] for row in rows)
    for name in ("kl", "posterior_std", "nll_by_samples", "nll_by_samples_test"):
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 0
    assert read(tmp_path / "kl_verdict.json")["verdict"] in (tmp_path / "report.md").read_text()
    BlobModel.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="prior_std"):
        AutoPeftModelForSeq2SeqLM.from_pretrained(str(tmp_path))


def test_evaluation_of_a_saved_run_gives_its_numbers_again(monkeypatch, tmp_path):
    run(monkeypatch, GLUE, *QUICK_GLUE, "--output_dir", tmp_path)
    before = read(tmp_path / "eval_results.json")
    assert run(monkeypatch, GLUE, *QUICK_GLUE, "--do_eval", "--output_dir", tmp_path) == 0
    after = read(tmp_path / "eval_results.json")
    for name in ("eval_accuracy", "eval_nll", "eval_mean_nll", "eval_ece"):
        assert after[name] == pytest.approx(before[name], rel=1e-5)


@pytest.mark.slow
def test_lora_runs_in_the_same_script_and_can_be_bayesianized_afterwards(monkeypatch, tmp_path, capsys):
    options = [*QUICK_SUMMARIZATION, "--do_train", "--do_eval"]
    assert run(monkeypatch, SUMMARIZATION, *options, "--method", "lora", "--output_dir", tmp_path / "lora") == 0
    assert "samples)" not in capsys.readouterr().out
    assert not (tmp_path / "lora" / "posterior_std.safetensors").exists()
    start = ["--adapter_name_or_path", tmp_path / "lora", "--output_dir", tmp_path / "blob"]
    assert run(monkeypatch, SUMMARIZATION, *options, *start) == 0
    assert (tmp_path / "blob" / "posterior_std.safetensors").exists()


@pytest.mark.slow
def test_a_search_finds_the_best_of_its_trials(monkeypatch, tmp_path, capsys):
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{tmp_path}/search.db"
    options = [*QUICK_GLUE, "--max_steps", "2", "--hp_search", "optuna", "--hp_trials", "3", "--hp_storage", storage]
    space = ["--hp_space", "beta=0.05:0.5:log", "kl_cycle_steps=1:2", "kl_schedule=geometric,uniform"]
    made, make_model = [], cli.make_model
    monkeypatch.setattr(cli, "make_model", lambda *args: made.append(make_model(*args)) or made[-1])
    assert run(monkeypatch, GLUE, *options, *space, "--output_dir", tmp_path / "search") == 0
    best = read(tmp_path / "search" / "best_run.json")
    study = optuna.load_study(study_name="search", storage=storage)
    assert len(study.trials) == 3 and best["eval_nll"] == min(trial.value for trial in study.trials)
    priors = [model.blob_config.prior_std for model in made[-3:]]  # before them is the Trainer's first model
    assert priors == [trial.params["beta"] for trial in study.trials] and len(set(priors)) == 3
    assert best["hyperparameters"] == study.best_params and "train with --beta" in capsys.readouterr().out
    mistakes = (
        (["--hp_search", "optuna"], "needs --hp_space"),
        (["--hp_search", "optuna", "--hp_space", "colour=1:2"], "'colour' is no training argument"),
        (["--hp_search", "optuna", "--hp_space", "beta=0:1:log"], "write name=low:high"),
        (["--hp_storage", "sqlite:///x.db"], "--hp_storage is Optuna's"),
        (["--hp_trials", "0"], "--hp_trials must be >= 1, got 0"),
        (["--hp_search", "optuna", "--hp_space", "beta=1:2", "--validation_file", ""], "there is no validation split"),
    )
    for number, (bad, message) in enumerate(mistakes):
        assert run(monkeypatch, GLUE, *QUICK_GLUE, *bad, "--output_dir", tmp_path / f"bad{number}") == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_an_untrained_base_is_kept_with_its_adapter(monkeypatch, tmp_path):
    model = [
        "--config_name", "bart", "--tokenizer_name", demo.BACKBONE_DIR, "--config_overrides",
        "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,decoder_attention_heads=2,"
        "encoder_ffn_dim=16,decoder_ffn_dim=16,max_position_embeddings=256",
    ]  # fmt: skip
    options = [*QUICK_SUMMARIZATION, *model, "--output_dir", tmp_path]
    assert run(monkeypatch, SUMMARIZATION, *options) == 0
    before = read(tmp_path / "eval_results.json")
    BlobModel.from_pretrained(tmp_path)
    assert run(monkeypatch, SUMMARIZATION, *options, "--do_eval") == 0
    assert read(tmp_path / "eval_results.json")["eval_nll"] == pytest.approx(before["eval_nll"], rel=1e-5)


@pytest.mark.slow
def test_a_saved_adapter_knows_its_beta_and_its_card_stays(monkeypatch, tmp_path):
    options = [*QUICK_GLUE, "--output_dir", tmp_path]
    assert run(monkeypatch, GLUE, *options, "--do_train", "--beta", "0.1", "--target_modules", "all-linear") == 0
    card = (tmp_path / "README.md").read_text()
    assert "| beta (prior std) | 0.1 |" in card
    assert run(monkeypatch, GLUE, *options, "--do_eval", "--adapter_name_or_path", tmp_path) == 0
    assert (tmp_path / "README.md").read_text() == card
    assert BlobModel.from_pretrained(tmp_path).blob_config.prior_std == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("decoding", ["mean", "mbr", "predictive"])
def test_decoding(monkeypatch, tmp_path, capsys, decoding):
    options = [*QUICK_SUMMARIZATION, "--decoding", decoding, "--num_beams", "2", "--output_dir", tmp_path]
    assert run(monkeypatch, SUMMARIZATION, *options) == 0
    results = read(tmp_path / "predict_results.json")
    rows = [json.loads(line) for line in (tmp_path / "generated_predictions.jsonl").read_text().splitlines()]
    assert all(row["summary"] for row in rows) and results["predict_mean_rouge1"] >= 0
    if decoding == "mean":
        assert "predict_rouge1" not in results and "samples" not in rows[0]
        return
    assert decoding in capsys.readouterr().out and results[f"predict_{decoding}_rouge1"] >= 0
    assert all(len(row["samples"]) == len(row["sample_utilities"]) == 2 for row in rows)
    assert ("mutual_information" in rows[0]["uncertainty"]) == (decoding == "predictive")
    assert (tmp_path / "plots" / "risk_coverage_test.png").stat().st_size > 0
    assert "prediction-rejection ratios (test)" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_rouge_during_training_and_a_test_set_of_another_size(monkeypatch, tmp_path):
    options = [
        "--predict_with_generate",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "4",
        "--generation_max_length",
        "8",
    ]
    assert run(monkeypatch, SUMMARIZATION, *QUICK_SUMMARIZATION, *options, "--output_dir", tmp_path) == 0
    logged = read(tmp_path / "trainer_state.json")["log_history"]
    assert any("eval_mean_rouge1" in entry for entry in logged)
    assert read(tmp_path / "predict_results.json")["predict_rouge1"] >= 0


def test_resume(monkeypatch, tmp_path):
    options = [*QUICK_GLUE, "--do_train", "--save_steps", "3", "--output_dir", tmp_path]
    assert run(monkeypatch, GLUE, *options) == 0
    final = load_file(tmp_path / "posterior_std.safetensors")
    assert run(monkeypatch, GLUE, *options, "--resume_from_checkpoint", tmp_path / "checkpoint-3") == 0
    again = load_file(tmp_path / "posterior_std.safetensors")
    assert all((final[name] - again[name]).abs().max() < 1e-6 for name in final)
    # now it is finished: nothing is trained, and what it came to stays to the byte
    others = ("costs.json", "training_args.bin")  # memory now; that it was resumed
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name not in others}
    assert run(monkeypatch, GLUE, *options, "--resume_from_checkpoint", "true") == 0
    assert [path for path, data in kept.items() if path.read_bytes() != data] == []


def test_yaml_configuration_as_the_only_argument(monkeypatch, tmp_path):
    config = tmp_path / "config.yaml"
    settings = {
        "demo": True,
        "max_steps": 2,
        "eval_samples": 0,
        "max_eval_samples": 8,
        "do_train": True,
        "use_cpu": True,
    }
    config.write_text("".join(f"{k}: {v}\n" for k, v in settings.items()) + f"output_dir: {tmp_path / 'out'}\n")
    assert run(monkeypatch, GLUE, config) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_preflight_warning_of_the_published_gamma_4_run(monkeypatch, tmp_path, caplog):
    run(
        monkeypatch,
        SUMMARIZATION,
        *QUICK_SUMMARIZATION,
        "--do_train",
        "--kl_cycle_steps",
        "100",
        "--output_dir",
        tmp_path,
    )
    assert "the KL will not be applied" in caplog.text and "M = 100" in caplog.text and "only 4" in caplog.text


def test_help_explains_beta_and_gamma(monkeypatch, capsys):
    for script in (GLUE, SUMMARIZATION):
        assert run(monkeypatch, script, "--help") == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "beta is the standard deviation of the prior" in text and "larger gamma, shorter cycle" in text


def test_another_run_in_the_same_folder_is_refused(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, GLUE, *QUICK_GLUE, "--do_train", "--output_dir", tmp_path) == 0
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert run(monkeypatch, GLUE, *QUICK_GLUE, "--do_train", "--beta", "0.3", "--output_dir", tmp_path) == 2
    assert "holds a run of different settings (beta 0.2 -> 0.3)" in capsys.readouterr().err
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_a_folder_of_before_a_flag_was_there_has_its_default(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, GLUE, *QUICK_GLUE, "--do_train", "--output_dir", tmp_path) == 0
    file = tmp_path / "run_settings.json"
    added = {"kl_pull", "posterior_scale", "early_stopping_patience", "calibration_file"}
    file.write_text(json.dumps({name: value for name, value in read(file).items() if name not in added}))
    again = [*QUICK_GLUE, "--do_train", "--output_dir", tmp_path]
    assert run(monkeypatch, GLUE, *again, "--early_stopping_patience", "2") == 2
    assert "different settings (early_stopping_patience None -> 2)" in capsys.readouterr().err
    assert not set(read(file)) & added
    assert run(monkeypatch, GLUE, *again) == 0
