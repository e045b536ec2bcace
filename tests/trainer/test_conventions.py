"""What people do with a Trainer by habit: the course's compute_metrics, plain arguments, searches, logs."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.models import TARGETS, tiny_bert
from helpers.training import arguments, blob_bert, rows, trainer
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.integrations import TensorBoardCallback

from blob_hf import BlobConfig, BlobError, BlobTrainer, BlobTrainingArguments, get_blob_model
from blob_hf.inference.predict import predict_classes
from blob_hf.trainer.predictions import ClassPredictions
from blob_hf.trainer.selection import lower_is_better
from blob_hf.trainer.training_args import BlobSeq2SeqTrainingArguments, as_blob_arguments

# ----- predictions -----------------------------------------------------------------------------------------------


def test_the_courses_compute_metrics_works(tmp_path):
    seen = {}

    def compute_metrics(eval_pred):
        logits, labels = eval_pred
        predicted = np.argmax(logits, axis=-1)
        seen.update(predicted=predicted, shape=logits.shape, first=logits[:, 0], rows=np.asarray(logits))
        return {"accuracy": (predicted == labels).mean()}

    run = trainer(tmp_path, blob_bert(init_eps=0.9), per_device_eval_batch_size=5)
    run.compute_metrics = compute_metrics
    data = rows(13, seed=1)
    metrics = run.evaluate()
    with torch.no_grad():
        found = predict_classes(run.model.eval(), {"input_ids": torch.tensor(data["input_ids"])}, run.eval_sampling)
    expected = found.log_probs.numpy()
    np.testing.assert_allclose(seen["rows"], expected, rtol=1e-4)
    np.testing.assert_allclose(seen["first"], expected[:, 0], rtol=1e-4)
    assert seen["shape"] == (13, 3) and (seen["predicted"] == expected.argmax(-1)).all()
    assert metrics["eval_accuracy"] == pytest.approx((expected.argmax(-1) == data["labels"]).mean())

    output = run.predict(data).predictions
    log_probs, samples, mean = output
    assert output.sample_log_probs is samples and samples.shape == (13, 3, 3) and mean is output.mean_log_probs
    assert log_probs is output[0] and output.argmax(-1).shape == (13,)
    again = pickle.loads(pickle.dumps(output))
    assert isinstance(again, ClassPredictions) and (again.mean_log_probs == mean).all()
    assert not hasattr(output, "_fields") and not hasattr(output, "no_such_thing")


# ----- plain arguments -------------------------------------------------------------------------------------------


def test_plain_training_arguments_get_blobs_defaults_and_keep_what_was_given(tmp_path):
    plain = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=3e-3, report_to="none", use_cpu=True, disable_tqdm=True, seed=7,
        save_strategy="no", metric_for_best_model="nll",
    )  # fmt: skip
    run = BlobTrainer(blob_bert(), plain, train_dataset=rows(), eval_dataset=rows(6))
    assert isinstance(run.args, BlobTrainingArguments) and type(plain) is TrainingArguments
    assert (run.args.learning_rate, run.args.seed, run.args.max_steps) == (3e-3, 7, 2)
    assert (run.args.gamma, run.args.eval_samples, run.args.kl_learning_rate) == (8.0, 10, "auto")
    assert run.args.greater_is_better is False
    run.train()
    assert run.kl_verdict is not None and np.isfinite(run.evaluate()["eval_nll"])
    seq2seq = as_blob_arguments(
        Seq2SeqTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, predict_with_generate=True),
        BlobSeq2SeqTrainingArguments,
    )
    assert seq2seq.predict_with_generate and seq2seq.decoding == "samples"
    ours = arguments(tmp_path)
    assert as_blob_arguments(ours, BlobTrainingArguments) is ours


# ----- the best checkpoint ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("nll", True), ("eval_nll", True), ("mean_nll", True), ("loss", True), ("eval_loss", True), ("ece", True),
        ("eval_mean_ece", True), ("brier", True), ("kl", True), ("eval_letters_fpr95", True), ("accuracy", False),
        ("eval_f1", False), ("mean_rougeL", False), ("rejection_area", False), ("ood_auroc", False),
    ],
)  # fmt: skip
def test_less_of_some_metrics_is_better(tmp_path, metric, lower):
    assert lower_is_better(metric) == lower
    assert arguments(tmp_path, metric_for_best_model=metric).greater_is_better is not lower


def test_the_checkpoint_with_the_lowest_nll_is_kept(tmp_path):
    run = trainer(
        tmp_path, max_steps=6, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="nll", learning_rate=0.3,
    )  # fmt: skip
    run.train()
    nlls = [entry["eval_nll"] for entry in run.state.log_history if "eval_nll" in entry]
    assert run.state.best_metric == min(nlls) < max(nlls)
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{1 + nlls.index(min(nlls))}")


def test_an_unknown_metric_is_one_line(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "f1"}
    run = trainer(tmp_path, **options)
    with pytest.raises(BlobError, match=r"must be one of loss, mean_nll, nll, sample_nll, got 'f1'"):
        run.train()
    assert not run.state.log_history  # before training
    run = trainer(tmp_path, **options)
    run.compute_metrics = lambda prediction: {"accuracy": 1.0}
    with pytest.raises(BlobError, match=r"sample_nll, accuracy, got 'f1'") as error:
        run.train()
    assert "\n" not in str(error.value)


# ----- a search in Python ----------------------------------------------------------------------------------------


def test_a_search_varies_the_prior_and_minimises_the_nll(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    priors, objectives = [], []

    def model_init():
        return blob_bert()  # which makes its BlobConfig without a look at the trial

    def compute_metrics(prediction):
        return {"accuracy": 1.0, "colour": 100.0}

    run = BlobTrainer(
        args=arguments(tmp_path, eval_strategy="no", max_steps=2), model_init=model_init, train_dataset=rows(),
        eval_dataset=rows(6, seed=1), compute_metrics=compute_metrics,
    )  # fmt: skip
    train = run.train

    def watched(*args, **kwargs):
        output = train(*args, **kwargs)
        priors.append((run.model.blob_config.prior_std, run.kl.step.prior_std))
        return output

    run.train = watched
    best = run.hyperparameter_search(
        hp_space=lambda trial: {"beta": trial.suggest_categorical("beta", [0.05, 0.4])}, n_trials=2, backend="optuna",
        direction="minimize", sampler=optuna.samplers.GridSampler({"beta": [0.05, 0.4]}),
    )  # fmt: skip
    assert sorted(priors) == [(0.05, 0.05), (0.4, 0.4)]
    objectives = [entry["eval_nll"] for entry in run.state.log_history if "eval_nll" in entry]
    assert 0 < best.objective < 10 and objectives  # one NLL, not the sum with colour
    with pytest.raises(BlobError, match="direction minimize"):
        run.hyperparameter_search(n_trials=1, direction="maximize", backend="optuna")


# ----- reporting -------------------------------------------------------------------------------------------------


def test_a_missing_reporter_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet_ml", "comet-ml")):
        with pytest.raises(BlobError, match=f"report_to {name} .*: pip install {package}$"):
            arguments(tmp_path, report_to=name)
    with pytest.raises(BlobError, match="report_to must be among none, all, .*tensorboard.*; got 'tensorbord'"):
        arguments(tmp_path, report_to=["tensorbord"])


def test_curves_are_reported_once_a_log(tmp_path):
    written = []
    writer = SimpleNamespace(
        add_scalar=lambda tag, value, step: written.append((tag, step)), add_text=lambda *args: None,
        flush=lambda: None, close=lambda: None, add_hparams=lambda *args, **kwargs: None,
    )  # fmt: skip
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    callback = TensorBoardCallback.__new__(TensorBoardCallback)
    callback.tb_writer, callback._SummaryWriter, callback.logging_dir = writer, None, None
    run.add_callback(callback)
    run.train()
    for tag in ("train/loss", "train/nll", "train/kl", "train/kl_loss", "train/posterior_std"):
        assert [step for name, step in written if name == tag] == [1, 2, 3, 4], tag
    assert [step for name, step in written if name == "eval/nll"] == [2, 4]


def test_a_checkpoint_of_before_the_logged_loss_was_the_nll_goes_on_with_nlls(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "logging_steps": 2}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    file = tmp_path / "whole" / "checkpoint-3" / "log_state.json"
    text = file.read_text().replace("nll_since_last_log", "loss_since_last_log")
    file.write_text(text)
    (file.parent / "checkpoint_files.json").unlink()
    again = trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(file.parent))
    for ours, theirs in zip(again.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
        assert ours.get("loss") == pytest.approx(theirs.get("loss"), rel=1e-5)


def test_no_model_without_labels_is_needed_to_predict(tmp_path):
    model = get_blob_model(tiny_bert(), BlobConfig(target_modules=TARGETS["bert"]))
    data = Dataset.from_dict({"input_ids": rows(6)["input_ids"]})
    assert trainer(tmp_path, model).predict(data).predictions.shape == (6, 3)


def test_a_posterior_inside_a_plain_model_is_refused(tmp_path):
    """transformers' own add_adapter leaves a model without our saving and loading."""
    base = tiny_bert()
    base.add_adapter(BlobConfig(target_modules=["query"]))
    with pytest.raises(BlobError, match=r"inside a plain BertForSequenceClassification .*get_blob_model"):
        trainer(tmp_path, base)
