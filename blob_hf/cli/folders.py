"""Where a run writes, and that no other run's results are lost there."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers.trainer_utils import get_last_checkpoint

from blob_hf.cli.bases import BASE_FOLDER
from blob_hf.reporting.run_summary import DataSource
from blob_hf.trainer.checkpoints import find_checkpoint, newest_complete
from blob_hf.trainer.training_args import Arguments, BlobTrainingArguments, changed_arguments
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

SETTINGS_FILE = "run_settings.json"
LOCK_FILE = "_run.lock"  # pushes leave out names with a leading underscore
# How something is loaded, shown or predicted, not which adapter comes out; a token is nobody's business.
_NOT_DEFINING = (
    "laplace_predictive", "compare_lora", "token", "cache_dir", "use_fast_tokenizer", "trust_remote_code",
    "ignore_mismatched_sizes", "overwrite_cache", "preprocessing_num_workers", "pad_to_max_length",
    "val_max_target_length", "ignore_pad_token_for_loss",
)  # fmt: skip
_NOT_GIVEN = "trainer_output"  # transformers' default
_RESULTS = ("adapter_config.json", "*/*/adapter_config.json", "best_run.json")  # of a run, its members, a search
_ELSEWHERE = "choose another --output_dir"

_held: list[tuple[FileLock, bool]] = []  # by this process, which is one run; and whether it trains there


def data_source(
    name: str, files: Mapping[str, str], task: tuple[str, str | None] | None, dataset: tuple[str | None, str | None]
) -> DataSource:
    """What the data of a run is called, and where it is on the Hub.

    Args:
        name: Of the task or the files.
        files: Own files by split; they are on no Hub.
        task: Where a named task is: data set and configuration.
        dataset: `--dataset_name` and `--dataset_config_name`.
    """
    if files:
        return DataSource(name)
    if task is not None:
        return DataSource(name, *task)
    path, config = dataset
    assert path is not None
    return DataSource(Path(path).name, None if Path(path).exists() else path, config)


def name_of_files(given: Mapping[str, str], demo: Mapping[str, Any], demo_name: str) -> str:
    """What the data of files is called: by the first file that is the user's own, or as the demo if none is.

    Args:
        given: Files by split.
        demo: The demo's arguments, its files among them.
    """
    own = [path for path in given.values() if path not in demo.values()]
    return Path(own[0]).name.split(".")[0] if own else demo_name


def with_output_dir(args: Arguments, name: str, adapter: str | None) -> Arguments:
    """The training arguments with an output folder, if they name none.

    It is runs/{name}. The evaluation of a named adapter goes into the adapter's own folder, or for a Hub repo into one
    of its name.
    """
    if args.output_dir != _NOT_GIVEN:
        return args
    if adapter is None or args.do_train:
        return changed_arguments(args, output_dir=os.path.join("runs", name))
    folder = adapter if os.path.isdir(adapter) else os.path.join("runs", Path(adapter).name)
    return changed_arguments(args, output_dir=folder)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A run's right to its output folder; `settle` says there what the run is, once nothing can keep it from starting.

    Attributes:
        settings: Those that make it this run; None where nothing is trained, or another process writes.
    """

    folder: Path
    settings: Mapping[str, Any] | None

    def settle(self) -> None:
        """Write the settings into the folder."""
        if self.settings is not None:
            files.write_text(self.folder / SETTINGS_FILE, json.dumps(self.settings, indent=2) + "\n")


def claim_output_dir(args: BlobTrainingArguments, fresh: bool, *others: Any) -> Claim:
    """Lock the output folder for this run (all its processes), unless results of another run would be lost there.

    Called before anything large is loaded, on every process. The lock is the system's and goes with the process, so
    that one of a killed run is none; `release_locks` gives it back.

    Args:
        fresh: Whether it trains a new adapter, whose prior std is then settled; a saved one knows its own.
        others: Argument dataclasses beside the training arguments.

    Raises:
        BlobError: Another run is writing there; or, to train, the folder holds results of different or unknown
            settings, or checkpoints of an unfinished run that nobody asked to resume. Nothing there is touched.
    """
    folder = Path(str(args.output_dir))
    settings = _settings(args, fresh, *others) if args.do_train else None
    objection = None
    if args.process_index == 0:
        objection = _lock(folder, args.do_train)
        if objection is None and settings is not None:
            defaults = {field.name: field.default for part in (args, *others) for field in dataclasses.fields(part)}
            defaults["train_head"] = False  # before there was a choice
            try:
                objection = _objection(folder, settings, defaults, args.resume_from_checkpoint)
            except BlobError as error:
                objection = str(error)
            if objection is None and settings.get("config_name") and not _holds_results(folder):
                # of a run that failed before it trained; another --config_name would read it back as its own
                shutil.rmtree(folder / BASE_FOLDER, ignore_errors=True)
    if args.world_size > 1:  # all processes stop together
        objection = broadcast_object_list([objection])[0]
    if objection is not None:
        raise BlobError(objection)
    return Claim(folder, settings if args.should_save else None)


def _settings(args: BlobTrainingArguments, fresh: bool, *others: Any) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in args.defining}
    settings["kl_schedule"] = args.schedule
    if fresh:
        settings["beta"] = args.prior_std
    for arguments in others:
        settings.update(dataclasses.asdict(arguments))
    for name in _NOT_DEFINING:
        settings.pop(name, None)
    if "train_head" in settings:
        settings["train_head"] = settings["train_head"] == "true"
    return _plain(settings)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they are read back."""
    return json.loads(json.dumps(settings, default=str))


def _holds_results(folder: Path) -> bool:
    """Whether there is something to lose."""
    return any(next(folder.glob(pattern), None) for pattern in _RESULTS) or (
        folder.is_dir() and get_last_checkpoint(str(folder)) is not None
    )


def _objection(
    folder: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any], resume: str | bool | None
) -> str | None:
    """Why a training must not begin in a folder, None if it may."""
    resume = None if resume in ("", "False", "false", False) else resume
    if resume not in (None, "True", "true", True):
        find_checkpoint(resume, str(folder))
    if not _holds_results(folder):
        return None
    if not (folder / SETTINGS_FILE).is_file():
        return f"{folder} holds a run whose settings are unknown (no {SETTINGS_FILE}); {_ELSEWHERE}"
    if changed := _changes(folder, settings, defaults):
        return f"{folder} holds a run of different settings ({changed}); {_ELSEWHERE}"
    newest = newest_complete(folder) if resume is None else None
    if newest is not None and not (folder / "adapter_config.json").is_file():
        return (
            f"{newest} is of a run of these settings that has not ended: add --resume_from_checkpoint true to go on "
            f"from there, or {_ELSEWHERE} to start anew"
        )
    if newest is not None:
        logger.warning(
            "%s holds a finished run of these settings, which is now trained anew; its adapter stays until the new one "
            "is complete. To only evaluate it: --do_eval",
            folder,
        )
    return None


def run_settings(folder: Path) -> dict[str, Any]:
    """What a run was started with; empty if that is not known.

    Raises:
        BlobError: The file is damaged.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BlobError(f"cannot read {path} ({error})") from error
    if not isinstance(found, dict):
        raise BlobError(f"cannot read {path} (it holds no JSON object)")
    return found


def _changes(folder: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> str:
    """What differs from the settings in a folder; "" if nothing does."""
    try:
        old = run_settings(folder)
    except BlobError as error:
        raise BlobError(f"{error}; {_ELSEWHERE}") from error
    old = {name: default for name, default in (defaults or {}).items() if name in settings} | old
    changed = [name for name in settings if old.get(name) != settings[name]]
    return ", ".join(f"{name} {old.get(name)!r} -> {settings[name]!r}" for name in changed[:5])


def _lock(folder: Path, trains: bool) -> str | None:
    """Lock a folder for this process; why it cannot be had, None if it can."""
    lock = FileLock(folder / LOCK_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        return f"another run is writing to {folder} at this moment; wait until it has ended, or {_ELSEWHERE}"
    except NotImplementedError:
        logger.warning("the disk of %s knows no locks: see to it yourself that no second run writes there", folder)
    except OSError as error:
        return f"cannot write to {folder} ({error.strerror}); {_ELSEWHERE} or make room"
    else:
        _held.append((lock, trains))
    return None


def release_locks() -> None:
    """Give the folders of this process back, and take away those that hold nothing else."""
    while _held:
        lock, _ = _held.pop()
        with suppress(OSError):
            os.unlink(lock.lock_file)  # while it is held: who has opened the file meanwhile finds that it is gone
            os.rmdir(os.path.dirname(lock.lock_file))
        lock.release(force=True)


def training_folder() -> Path | None:
    """The output folder of this process's training, None if it trains nothing."""
    return next((Path(lock.lock_file).parent for lock, trains in _held if trains), None)


def claim_folder(folder: Path, settings: Mapping[str, Any], write: bool = True) -> None:
    """Write an experiment's settings into a folder, unless it holds one of others.

    Raises:
        BlobError: naming the settings that differ. Nothing in the folder is touched.
    """
    settings, path = _plain(settings), folder / SETTINGS_FILE
    used = path.is_file() and any(entry.name != SETTINGS_FILE for entry in folder.iterdir())
    if used and (changed := _changes(folder, settings, None)):
        raise BlobError(f"{folder} holds a run of different settings ({changed}); {_ELSEWHERE}")
    if write:
        files.write_text(path, json.dumps(settings, indent=2) + "\n")
