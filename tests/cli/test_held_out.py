"""What is chosen by held-out rows: early stopping against transformers' own, and which rows those are."""

import json

import pytest
from helpers.models import TARGETS, tiny_bert
from helpers.running import GLUE, run_script
from helpers.training import arguments, rows
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed

from blob_hf import BlobTrainer
from blob_hf.cli.held_out import EVALUATIONS, early_stopping
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.routes import ROUTES
from blob_hf.trainer.dropout import no_base_dropout
from blob_hf.tuner.build import as_blob_model

DATA, HELD_OUT = rows(24), rows(16, seed=5)
QUICK = [
    "--demo", "--max_eval_samples", "30", "--disable_tqdm", "true", "--use_cpu", "true", "--compare_lora", "false",
    "--eval_samples", "2", "--max_steps", "10",
]  # fmt: skip


def lora_bert():
    set_seed(0)
    return get_peft_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"], task_type="SEQ_CLS"))


def test_it_stops_where_transformers_does_and_keeps_what_it_keeps(tmp_path):
    """A plain Trainer on the same LoRA, stopped by transformers' callback on its own loss (the mean NLL)."""
    settings = {
        "max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 3e-2, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "per_device_eval_batch_size": 16,
    }  # fmt: skip
    theirs = Trainer(
        lora_bert(),
        TrainingArguments(
            str(tmp_path / "theirs"), eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3,
            load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False, **settings,
        ),
        train_dataset=DATA, eval_dataset=HELD_OUT, callbacks=[EarlyStoppingCallback(3)],
    )  # fmt: skip
    with no_base_dropout(theirs.model):
        theirs.train()
    method = MethodArguments("lora", early_stopping_patience=3)
    own = arguments(tmp_path / "ours", kl_cycle_steps=None, **settings, do_train=True)
    args, callbacks = early_stopping(ROUTES["lora"], own, method, len(DATA))
    assert args.eval_steps == args.save_steps == 60 // EVALUATIONS and own.eval_strategy == "no"
    ours = BlobTrainer(
        as_blob_model(lora_bert()), args, train_dataset=DATA, eval_dataset=HELD_OUT, callbacks=callbacks,
        point_estimate=True,
    )  # fmt: skip
    ours.train()
    assert 3 < ours.state.global_step < 60  # it did stop, and not at once
    assert ours.state.global_step == theirs.state.global_step
    assert ours.state.best_metric == pytest.approx(theirs.state.best_metric, rel=1e-5)
    losses = {entry["step"]: entry["eval_nll"] for entry in ours.state.log_history if "eval_nll" in entry}
    assert ours.state.best_metric == min(losses.values())
    assert ours.evaluate(HELD_OUT)["eval_nll"] == pytest.approx(min(losses.values()), rel=1e-5)  # and is that model


def test_without_patience_nothing_changes(tmp_path):
    args = arguments(tmp_path, do_train=True)
    assert early_stopping(ROUTES["lora"], args, MethodArguments("lora"), 24) == (args, [])


def test_the_steps_of_epochs_are_counted(tmp_path):
    own = arguments(tmp_path, max_steps=-1, num_train_epochs=20, per_device_train_batch_size=8, do_train=True)
    args, _ = early_stopping(ROUTES["lora"], own, MethodArguments("lora", early_stopping_patience=2), 24)
    assert args.eval_steps == 20 * 3 // EVALUATIONS


def test_given_rows_are_held_out_and_all_of_train_is_trained_on(monkeypatch, tmp_path):
    lines = [{"sentence1": f"Will you come {n}?", "sentence2": "Yes.", "label": n % 2} for n in range(6)]
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--calibration_file", file, "--early_stopping_patience", "1", "--temperature_scaling"]
    assert run_script(monkeypatch, GLUE, *QUICK, *flags, "--output_dir", tmp_path / "run") == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    evaluated = [entry for entry in state["log_history"] if "eval_nll" in entry]
    assert evaluated and (tmp_path / "run" / "calibration_results.json").is_file()
    best, end, report = state["best_global_step"], state["global_step"], (tmp_path / "run" / "report.md").read_text()
    assert (f"the adapter is that of step {best}, the best by nll" in report) == (best < end)
    # 120 rows in batches of 32 are 4 steps an epoch; a held-out tenth would leave 108
    assert evaluated[0]["epoch"] == pytest.approx(evaluated[0]["step"] / 4)


def test_a_patience_below_one_is_refused(monkeypatch, tmp_path, capsys):
    flags = ["--early_stopping_patience", "0", "--output_dir", tmp_path]
    assert run_script(monkeypatch, GLUE, *QUICK, *flags) == 2
    assert "early_stopping_patience must be >= 1, got 0" in capsys.readouterr().err


def test_a_fitted_method_ignores_it(tmp_path):
    args = arguments(tmp_path, do_train=True)
    method = MethodArguments("tfb", early_stopping_patience=3)
    assert early_stopping(ROUTES["tfb"], args, method, 24) == (args, [])


def test_given_eval_steps_are_kept(tmp_path):
    method = MethodArguments("lora", early_stopping_patience=3)
    for given, expected in ((7, 7), (0.25, 10), (None, 2)):
        own = arguments(tmp_path, max_steps=40, eval_steps=given, do_train=True)
        args, _ = early_stopping(ROUTES["lora"], own, method, 24)
        assert args.eval_steps == args.save_steps == expected
