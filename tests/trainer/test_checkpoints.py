import json
import logging
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.training import blob_bert, parameters, trainer
from safetensors.torch import load_file, save_file

from blob_hf.trainer.checkpoints import SEAL, find_checkpoint, find_corruption, newest_complete
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7, "logging_steps": 2}


def spoiled(**config):
    """A model that must be overwritten in full for a resumed run to be right."""
    model = blob_bert(**config)
    for value in model.parameters():
        if value.requires_grad:
            value.data.uniform_(0.1, 1)
    return model


def logged(run):
    """The log without wall-clock times."""
    entries = [entry for entry in run.state.log_history if "train_runtime" not in entry]
    return [
        {key: value for key, value in entry.items() if "per_second" not in key and "runtime" not in key}
        for entry in entries
    ]


# ----- exact resume ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"noise": "flipout"}, {}),
        ({"noise": "local", "std_parameterization": "softplus"}, {"gradient_accumulation_steps": 2}),
        ({"noise": "shared", "lora_dropout": 0.3}, {"eval_strategy": "steps", "eval_steps": 2, "train_samples": 2}),
        ({"noise": "flipout", "init_eps": 1e-3}, {"kl_learning_rate": 0.5, "optim": "sgd"}),
        ({"noise": "flipout"}, {"kl_gradient": "loss", "base_dropout": True}),
    ],
    ids=["flipout", "softplus", "dropout", "sgd", "loss"],
)
def test_a_resumed_run_is_bit_identical(tmp_path, config, options):
    """Weights, stds, losses, KL weights and the log; the save at step 3 is in mid-epoch and between two logs."""
    whole = trainer(tmp_path / "whole", blob_bert(**config), **SAVING, **options)
    whole.train()
    again = trainer(tmp_path / "again", spoiled(**config), **SAVING, **options)
    torch.rand(1000)  # another random state than that of the run that stopped
    assert again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")).global_step == 7
    assert parameters(again.model).keys() == parameters(whole.model).keys()
    for name, value in parameters(whole.model).items():
        assert torch.equal(parameters(again.model)[name], value), name
    histories = [(tmp_path / name / "kl_history.csv").read_text() for name in ("whole", "again")]
    assert histories[0] == histories[1] and len(histories[0].splitlines()) == 8
    assert logged(again) == logged(whole)
    assert str(again.kl.diagnosis) == str(whole.kl.diagnosis)  # from the stds of the start, not of the checkpoint
    for run in (whole, again):
        run.save_model()
    for name in ("adapter_model.safetensors", "posterior_std.safetensors"):
        first, second = (load_file(tmp_path / run / name) for run in ("whole", "again"))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_true_takes_the_newest_checkpoint(tmp_path):
    whole = trainer(tmp_path / "whole", **SAVING)
    whole.train()
    shutil.rmtree(tmp_path / "whole" / "checkpoint-7")
    again = trainer(tmp_path / "whole", spoiled(), **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.resumed_from == str(tmp_path / "whole" / "checkpoint-6")
    assert all(torch.equal(parameters(again.model)[name], value) for name, value in parameters(whole.model).items())


def test_training_again_without_resuming_starts_a_new_history(tmp_path):
    trainer(tmp_path, max_steps=4).train()
    trainer(tmp_path, max_steps=2).train()
    assert len((tmp_path / "kl_history.csv").read_text().splitlines()) == 3


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finish(run, resume=None):
    """What the scripts do at the end of a training; without transformers' count of operations, which is not printed."""
    output = run.train(resume_from_checkpoint=resume)
    run.save_model()
    run.save_state()
    output.metrics.pop("total_flos", None)
    return output


@pytest.mark.parametrize(
    ("length", "times"),
    [
        ({"max_steps": 5}, 2),
        ({"max_steps": -1, "num_train_epochs": 1.5}, 1),
        ({"max_steps": -1, "num_train_epochs": 2}, 1),
    ],
)
def test_a_finished_run_trains_nothing_more(tmp_path, caplog, length, times):
    """Three steps an epoch: of 5 steps transformers would make 6, then 7; what is in the folder stays to the byte."""
    options = {**SAVING, **length, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    first = trainer(tmp_path, **options)
    output = finish(first)
    before, verdict = contents(tmp_path), first.kl_verdict.to_dict()
    for resume in [str(tmp_path / f"checkpoint-{output.global_step}"), True][:times]:
        again = trainer(tmp_path, spoiled(), **options)
        caplog.clear()
        with caplog.at_level(logging.INFO, "blob_hf"):
            found = finish(again, resume)
        assert f"was finished at step {output.global_step}: nothing is left to train" in caplog.text
        assert found == output and again.state.global_step == output.global_step
        assert all(torch.equal(parameters(again.model)[name], value) for name, value in parameters(first.model).items())
        assert contents(tmp_path) == before
        assert again.kl_verdict.to_dict() == verdict
    again.evaluate()
    assert "eval_nll" in again.state.log_history[-1]  # it logs as ever


def test_a_finished_run_of_which_the_folder_keeps_the_checkpoint_alone(tmp_path):
    """The figures are then those of the log; three steps are in it, the fourth is not."""
    options = {**SAVING, "max_steps": 4, "logging_steps": 3}
    expected = trainer(tmp_path, **options).train()
    found = trainer(tmp_path, spoiled(), **options).train(resume_from_checkpoint=True)
    assert (found.global_step, found.metrics["train_loss"]) == (4, found.training_loss)
    assert found.training_loss == pytest.approx(expected.training_loss, rel=1e-6)


def test_a_finished_run_goes_on_if_there_are_more_steps_now(tmp_path):
    steady = {**SAVING, "lr_scheduler_type": "constant", "kl_schedule": "uniform", "kl_pull": 0.5}  # of any length
    whole = trainer(tmp_path / "whole", **steady)
    whole.train()
    trainer(tmp_path / "parts", **{**steady, "max_steps": 5}).train()
    longer = trainer(tmp_path / "parts", spoiled(), **steady)
    assert longer.train(resume_from_checkpoint=True).global_step == 7
    for name, value in parameters(whole.model).items():
        assert torch.equal(parameters(longer.model)[name], value), name


# ----- whole or not there ----------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    trainer(tmp_path, **SAVING).train()
    return tmp_path


def test_every_checkpoint_is_complete_and_nothing_else_is_left(finished):
    folders = sorted(path.name for path in finished.iterdir() if path.is_dir())
    assert folders == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]
    for name in folders:
        assert find_corruption(finished / name) is None
        listed = json.loads((finished / name / SEAL).read_text())
        assert {"posterior_std.safetensors", "optimizer.pt", "rng_state.pth", "kl_history.csv"} <= listed.keys()


@pytest.mark.parametrize("how", ["truncate", "flip", "delete", "unsealed", "empty"])
def test_a_torn_checkpoint_is_skipped_with_a_warning(finished, how, caplog):
    torn = finished / "checkpoint-7"
    file = torn / ("optimizer.pt" if how != "flip" else "adapter_model.safetensors")
    data = bytearray(file.read_bytes())
    if how == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif how == "flip":
        data[-5] ^= 1
        file.write_bytes(data)
    elif how == "delete":
        file.unlink()
    elif how == "unsealed":
        (torn / SEAL).unlink()
    else:
        shutil.rmtree(torn)
        torn.mkdir()
    with caplog.at_level(logging.WARNING, "blob_hf"):
        assert newest_complete(finished) == str(finished / "checkpoint-6")
    assert f"skipping the torn checkpoint {torn}" in caplog.text
    assert (file.name if how in ("truncate", "flip", "delete") else SEAL) in caplog.text
    if how == "truncate":
        with pytest.raises(BlobError, match=r"cannot resume from .*checkpoint-7: optimizer.pt is missing or damaged"):
            find_checkpoint(str(torn), str(finished))


def test_what_can_be_resumed_from(finished, tmp_path):
    assert find_checkpoint(None, str(finished)) is None and find_checkpoint("False", str(finished)) is None
    assert find_checkpoint("true", str(finished)) == str(finished / "checkpoint-7")
    with pytest.raises(BlobError, match="is not a folder"):
        find_checkpoint(str(tmp_path / "nowhere"), str(finished))
    with pytest.raises(BlobError, match="no complete checkpoint to resume from"):
        find_checkpoint(True, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "killed_at", ["adapter", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state", "seal"]
)
def test_a_run_killed_while_saving_keeps_the_checkpoint_before(tmp_path, monkeypatch, killed_at):
    """The process ends in the middle of writing one file of its second checkpoint; then a new one resumes."""
    whole = trainer(tmp_path / "whole", **SAVING)
    whole.train()

    def dying(write, argument):
        def wrapped(*args, **kwargs):
            if killed_at in str(args[argument]) and "checkpoint-6" in str(args[argument]):
                Path(args[argument]).write_bytes(b"half")
                raise KeyboardInterrupt
            return write(*args, **kwargs)

        return wrapped

    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dying(torch.save, 1))
        patch.setattr("blob_hf.tuner.adapter_files.save_file", dying(save_file, 1))
        patch.setattr("transformers.TrainerState.save_to_json", dying(whole.state.__class__.save_to_json, 1))
        patch.setattr("blob_hf.utils.files.write_text", dying(files.write_text, 0))
        killed_at = {"seal": SEAL}.get(killed_at, killed_at)
        with pytest.raises(KeyboardInterrupt):
            trainer(folder, **SAVING).train()
    assert newest_complete(folder) == str(folder / "checkpoint-3") and not (folder / "checkpoint-6").exists()
    again = trainer(folder, spoiled(), **SAVING)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(parameters(again.model)[name], value) for name, value in parameters(whole.model).items())
    assert sorted(path.name for path in folder.glob("*/")) == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]


@contextmanager
def file_size_limit(size):
    """What a full disk does: writing beyond `size` bytes fails (Python ignores the signal, the write returns EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1, 3000, 12000])  # bytes: the first file fails, the adapter, the optimizer
def test_a_disk_that_fills_up_is_one_line_and_loses_nothing(tmp_path, size):
    options = {**SAVING, "logging_strategy": "no"}
    trainer(tmp_path, **{**options, "max_steps": 3}).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    more = trainer(tmp_path, **options)
    with (
        file_size_limit(size),
        pytest.raises(BlobError, match=r"cannot save .*checkpoint-6 \(.*checkpoint-3, which is") as error,
    ):
        more.train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    run = trainer(
        tmp_path, max_steps=8, save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2,
        save_total_limit=2, metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=0.3,
        load_best_model_at_end=True,
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.parent == tmp_path and find_corruption(best) is None
    kept = sorted(tmp_path.glob("checkpoint-*"))
    assert len(kept) == 2 and {best, tmp_path / "checkpoint-8"} >= set(kept) - {tmp_path / "checkpoint-6"}
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
