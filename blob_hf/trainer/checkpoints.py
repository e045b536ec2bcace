"""Checkpoints that are whole or not there: written aside, sealed with a checksum of every file, then renamed.

A killed run leaves at most a folder `_checkpoint` behind, never half a `checkpoint-N`. The seal also shows later
damage (a deletion cut short, a lost disk block), so that a resumed run goes back to the newest checkpoint it can trust.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from blob_hf.trainer.engines import gathered_adapter
from blob_hf.tuner import adapter_files
from blob_hf.tuner.registry import companion_files
from blob_hf.utils import files, hub
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

SEAL = "checkpoint_files.json"
_STAGING = "_checkpoint"  # the Trainer's pushes leave out names with a leading underscore
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container.cc", "iostream error")  # torch.save on a full disk
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def seal(folder: Path) -> None:
    """List every file of a checkpoint with its SHA-256: the last thing that is written into it."""
    files.write_text(folder / SEAL, json.dumps(_checksums(folder), indent=1) + "\n")


def find_corruption(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is complete: all files are there as they were written."""
    try:
        listed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        found = _checksums(folder)
    except (OSError, ValueError):
        return f"it has no readable {SEAL}, so its saving was not finished"
    bad = [name for name in listed if listed[name] != found.get(name)]
    return f"{bad[0]} is missing or damaged" if bad else None


def newest_complete(run_folder: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint of a run, None if there is none; a warning names each one that is skipped."""
    folder = Path(run_folder)
    steps = {path: int(match[1]) for path in folder.glob("*/") if (match := _NAME.fullmatch(path.name))}
    for path in sorted(steps, key=lambda path: steps[path], reverse=True):
        reason = find_corruption(path)
        if reason is None:
            return str(path)
        logger.warning("skipping the torn checkpoint %s: %s", path, reason)
    return None


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with path.open("rb") as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _publish(staged: Path, checkpoint: Path) -> None:
    """Give a finished checkpoint its name; one of the same step makes way for it."""
    seal(staged)
    old = staged.with_name(f"old-{checkpoint.name}")
    if checkpoint.exists():
        os.replace(checkpoint, old)
    os.replace(staged, checkpoint)
    shutil.rmtree(staged.parent, ignore_errors=True)


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class CheckpointMixin(_Base):
    """Makes a transformers trainer save its checkpoints atomically, and resume from the newest complete one."""

    args: Any
    resumed_from: str | None = None
    _staging = False  # whether a checkpoint is being written aside
    _pushed: str | None = None  # the checkpoint that is being pushed
    _finished_log: list[dict[str, Any]] | None = None  # of a run that is resumed although nothing is left to train
    _logs = True  # else `log` does nothing

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `train`; `resume_from_checkpoint=True` takes the newest complete checkpoint.

        Of a run that is finished already it trains nothing, and returns what the run came to.

        Raises:
            BlobError: There is none, the one that is named is damaged, or this engine cannot continue it.
        """
        self.resumed_from = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if self.resumed_from is not None:
            self.check_resumable(Path(self.resumed_from))
        return super().train(self.resumed_from, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' `save_model`; also under FSDP with sharded states the adapter is gathered and written whole."""
        super().save_model(output_dir, _internal_call)
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            adapter = gathered_adapter(self.accelerator.unwrap_model(self.model))
            if self.args.should_save:
                self._save(output_dir or self.args.output_dir, state_dict=adapter)
            self.accelerator.wait_for_everyone()

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """transformers' begin; of a finished run past its last epoch, of which it would train one more step."""
        begin = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._finished_log = None
        if resume_from_checkpoint is None or self.state.global_step < max_steps:
            return begin
        self._finished_log = _log_of_run(Path(resume_from_checkpoint), self.state)
        if self.is_world_process_zero():
            logger.info("the run was finished at step %d: nothing is left to train", self.state.global_step)
        return num_train_epochs, 0

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """transformers' end; a finished run keeps its log and its figures, which would be those of no step at all."""
        if self._finished_log is None:
            return super()._finalize_training(*args, **kwargs)
        unlogged: float = self._tr_loss.item()
        self._logs = False
        try:
            output = super()._finalize_training(*args, **kwargs)
        finally:
            self._logs = True
        self.state.log_history, steps = self._finished_log, self.state.global_step
        metrics = {**output.metrics, "train_loss": _mean_loss(self._finished_log, unlogged, steps)}
        for entry in self._finished_log:
            if "train_loss" in entry and entry["step"] == steps:
                metrics = {name: value for name, value in entry.items() if name != "step"}
        return TrainOutput(steps, metrics["train_loss"], metrics)

    @property
    def was_finished(self) -> bool:
        """Whether the last call of `train` found that nothing was left to train."""
        return self._finished_log is not None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._logs:
            super().log(logs, start_time)

    def check_resumable(self, folder: Path) -> None:
        """For subclasses: refuse a checkpoint that this run cannot continue exactly."""

    def save_extra(self, folder: Path) -> None:
        """For subclasses: add files of their own to a checkpoint (called on every process)."""

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _STAGING) if self._staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """transformers' saving, in a folder aside; then seal it, rename it, push it and delete old ones."""
        run_folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, checkpoint = run_folder / _STAGING / name, run_folder / name
        if self.args.should_save:
            shutil.rmtree(run_folder / _STAGING, ignore_errors=True)  # what a killed run left
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            self.save_extra(staged)
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(checkpoint)
                if self.args.should_save:
                    self.state.save_to_json(str(staged / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                _publish(staged, checkpoint)
            self.accelerator.wait_for_everyone()
            if self.is_local_process_zero() and staged.exists():  # a node with a disk of its own
                _publish(staged, checkpoint)
        except Exception as error:
            torch_cannot = isinstance(error, RuntimeError) and any(part in str(error) for part in _TORCH_CANNOT_WRITE)
            cannot = isinstance(error, (OSError, SafetensorError, BlobError)) or torch_cannot
            if not (cannot or files.is_full_disk(error)):  # tokenizers raises a bare Exception
                raise
            raise self._cannot_save(checkpoint, error) from error
        finally:
            self._staging = False
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            rotate_checkpoints(
                str(run_folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _cannot_save(self, checkpoint: Path, error: Exception) -> BlobError:
        shutil.rmtree(checkpoint.parent / _STAGING, ignore_errors=True)
        kept = newest_complete(checkpoint.parent)
        cause = error.__cause__ if isinstance(error, BlobError) and error.__cause__ else error  # without its advice
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        if isinstance(cause, RuntimeError) and _TORCH_CANNOT_WRITE[1] in reason:
            reason = "torch could not write it, most likely because the disk is full"
        way_on = f"resume from {kept}, which is complete" if kept else "start again: no checkpoint is complete yet"
        return BlobError(f"cannot save {checkpoint} ({reason}); make room and {way_on}")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:
            self._pushed = checkpoint_folder
            super()._push_from_checkpoint(checkpoint_folder)
            self._pushed = None

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with hub.pushing(self.args.hub_model_id, "log in, or train without push_to_hub"):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' push of the finished run; a failure is one line, and the run is complete on the disk."""
        advice = f"push again: hf upload {self.hub_model_id} {self.args.output_dir}"
        with hub.pushing(self.hub_model_id, advice):
            return super().push_to_hub(*args, **kwargs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        pushed = getattr(self, "push_in_progress", None)
        for job in pushed.jobs if pushed is not None else []:
            if job.done() and (error := job.exception()) is not None:
                logger.warning("a checkpoint could not be pushed (%s); the final push holds the adapter", error)

    def complete_push(self) -> None:
        """When a push of a checkpoint begins: put its whole adapter beside the card (transformers knows no std)."""
        if self._pushed is not None:
            with files.staged(self.args.output_dir) as folder:
                for pattern in (*adapter_files.NAMES, *companion_files()):
                    for file in Path(self._pushed).glob(pattern) if "/" not in pattern else ():
                        shutil.copy(file, folder)


def _log_of_run(checkpoint: Path, saved: TrainerState) -> list[dict[str, Any]]:
    """The log of the run that a last checkpoint is of: with the figures of its end, if its folder has them."""
    path = checkpoint.parent / TRAINER_STATE_NAME
    if path.is_file():
        whole = TrainerState.load_from_json(str(path))
        same = whole.log_history[: len(saved.log_history)] == saved.log_history
        if same and whole.global_step == saved.global_step:
            return whole.log_history
    return saved.log_history


def _mean_loss(log: list[dict[str, Any]], unlogged: float, steps: int) -> float:
    """Of all steps of a run: each entry of its log is the mean since the one before."""
    total, last = unlogged, 0
    for entry in log:
        if "loss" in entry:
            total, last = total + entry["loss"] * (entry["step"] - last), entry["step"]
    return total / steps


def find_checkpoint(wanted: str | bool | None, run_folder: str) -> str | None:
    """The checkpoint that `resume_from_checkpoint` (a path, or true for the newest) stands for.

    Raises:
        BlobError: There is none, or the one named is damaged.
    """
    if wanted in (None, "", "False", "false", False):
        return None
    if wanted in ("True", "true", True):
        newest = newest_complete(run_folder)
        if newest is None:
            raise BlobError(f"no complete checkpoint to resume from in {run_folder}; train without resuming")
        return newest
    folder = Path(str(wanted))
    if not folder.is_dir():
        raise BlobError(f"the checkpoint to resume from, {wanted}, is not a folder")
    if (folder / SEAL).is_file() and (reason := find_corruption(folder)):
        raise BlobError(f"cannot resume from {wanted}: {reason}; choose another checkpoint, or true for the newest")
    return str(folder)
