"""Where a run writes, and that no other run's results are lost there."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from blob_hf.trainer.training_args import DEFINING, Arguments, BlobTrainingArguments, changed_arguments
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

SETTINGS_FILE = "run_settings.json"
# How something is loaded, shown or predicted, not which adapter comes out; a token is nobody's business.
_NOT_DEFINING = (
    "laplace_predictive", "compare_lora", "token", "cache_dir", "use_fast_tokenizer", "trust_remote_code",
    "ignore_mismatched_sizes", "overwrite_cache", "preprocessing_num_workers", "pad_to_max_length",
    "val_max_target_length", "ignore_pad_token_for_loss",
)  # fmt: skip
_NOT_GIVEN = "trainer_output"  # transformers' default


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


def claim_output_dir(args: BlobTrainingArguments, fresh: bool, *others: Any) -> None:
    """Write the settings of this run into its folder, unless the folder holds a run of different settings.

    Args:
        fresh: Whether it trains a new adapter, whose prior std is then settled; a saved one knows its own.
        others: Argument dataclasses beside the training arguments.

    Raises:
        BlobError: naming the settings that differ. Nothing in the folder is touched.
    """
    settings = {name: getattr(args, name) for name in DEFINING}
    settings["kl_schedule"] = args.schedule
    if fresh:
        settings["beta"] = args.prior_std
    for arguments in others:
        settings.update(dataclasses.asdict(arguments))
    for name in _NOT_DEFINING:
        settings.pop(name, None)
    if "train_head" in settings:
        settings["train_head"] = settings["train_head"] == "true"
    folder = Path(str(args.output_dir))
    known = (folder / SETTINGS_FILE).is_file()
    if not known and (
        (folder / "adapter_config.json").is_file() or (folder.is_dir() and get_last_checkpoint(str(folder)))
    ):
        raise BlobError(
            f"{folder} holds a run whose settings are unknown (no {SETTINGS_FILE}); choose another --output_dir"
        )
    defaults = {field.name: field.default for part in (args, *others) for field in dataclasses.fields(part)}
    defaults["train_head"] = False  # before there was a choice
    claim_folder(folder, settings, args.should_save, defaults)


def claim_folder(
    folder: Path, settings: Mapping[str, Any], write: bool = True, defaults: Mapping[str, Any] | None = None
) -> None:
    """Write settings into a folder, unless it has others.

    Args:
        defaults: What settings were in a folder that does not name them: those that a later version has added.

    Raises:
        BlobError: naming the settings that differ. Nothing in the folder is touched.
    """
    settings = json.loads(json.dumps(settings, default=str))
    path = folder / SETTINGS_FILE
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        old = {name: default for name, default in (defaults or {}).items() if name in settings} | old
        changed = [name for name in settings if old.get(name) != settings[name]]
        if changed:
            shown = ", ".join(f"{name} {old.get(name)!r} -> {settings[name]!r}" for name in changed[:5])
            raise BlobError(f"{folder} holds a run of different settings ({shown}); choose another --output_dir")
    if write:
        files.write_text(path, json.dumps(settings, indent=2) + "\n")
