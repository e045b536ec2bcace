"""What both scripts share around the training itself: arguments, the output folder, errors, results on disk."""

import dataclasses
import errno
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import transformers
import yaml
from transformers import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from blob_hf.baselines import METHODS, ignored_flags
from blob_hf.trainer.training_args import DEFINING
from blob_hf.tuner.config import BlobConfig
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError, NonFiniteLossError

logger = logging.getLogger(__name__)

_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR)
# What gloo and NCCL say when a process they talk to is gone
_LOST_PEER = ("onnection closed by peer", "onnection reset by peer", "remote process exited", "Broken pipe")
_GO_ON = "--resume_from_checkpoint true continues from the newest complete checkpoint"
SETTINGS_FILE = "run_settings.json"


def _stopped(signum: int, frame: Any) -> NoReturn:
    """Launchers end the other processes of a run with SIGTERM when one has failed."""
    _say(f"stopped by the launcher, because another process failed or the job ended; {_GO_ON}")
    os._exit(128 + signum)  # not through exceptions: the process may be in the middle of a collective


def _say(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")  # in one write: processes that fail together share the terminal


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a user's mistake as one line on stderr (main process only) and exit with 2.

    The same when another process of the run has died: then this one cannot go on, and its checkpoints can.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stopped)
    try:
        yield
    except BlobError as error:
        if int(os.environ.get("RANK", "0")) == 0 or isinstance(error, NonFiniteLossError):  # one rank may see it alone
            _say(str(error))
        sys.exit(2)
    except RuntimeError as error:
        if not any(part in str(error) for part in _LOST_PEER):
            raise
        _say(f"another process of this run has died ({_first_line(error)}); {_GO_ON}")
        sys.exit(2)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        where = f" to {error.filename}" if error.filename else ""
        _say(f"cannot write{where} ({error.strerror}); choose another --output_dir or make room")
        sys.exit(2)


def parse_arguments(
    types: Sequence[Any],
    demo: Mapping[str, Any],
    description: str,
    argv: Sequence[str] | None = None,
    pass_on: bool = False,
) -> tuple[Any, ...]:
    """Parse the command line, or a .json/.yaml file as the only argument, into dataclasses.

    Args:
        types: Argument dataclasses; one of them has a flag `demo`.
        demo: Defaults that take effect with `--demo` (anything given explicitly wins).
        pass_on: Return the arguments that no dataclass knows as a list at the end, instead of refusing them.

    Raises:
        BlobError: A value or a configuration key that the dataclasses refuse.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(list(types), description=description, allow_abbrev=not pass_on)
    try:
        if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
            argv = _as_argv(_read_config(argv[0]))
        if "--demo" in argv:
            parser.set_defaults(**demo)
        return parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=pass_on)
    except BlobError:
        raise
    except ValueError as error:
        raise BlobError(" ".join(str(error).split())) from error


class _Parser(HfArgumentParser):
    """transformers' parser, whose complaints are one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise BlobError(f"{message} (--help lists the arguments)")


def _read_config(path: str) -> dict[str, Any]:
    try:
        content = Path(path).read_text(encoding="utf-8")
        config = json.loads(content) if path.endswith(".json") else yaml.safe_load(content)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BlobError(f"cannot read the configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise BlobError(f"the configuration {path} must map argument names to values, got a {type(config).__name__}")
    return config


def _as_argv(config: dict[str, Any]) -> list[str]:
    """A configuration as command-line arguments, so that both go through the same types and checks."""
    argv: list[str] = []
    for name, value in config.items():
        if value is None or (name == "demo" and not value):
            continue
        argv.append(f"--{name}")
        if name == "demo":
            continue
        if isinstance(value, list):
            argv += [str(item) for item in value]
        else:
            argv.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return argv


def run_everything_by_default(training_args: Any) -> None:
    """With none of --do_train, --do_eval, --do_predict given, do all three."""
    asked_to_eval = training_args.do_eval and training_args.eval_strategy == "no"  # else transformers has set do_eval
    if not (training_args.do_train or asked_to_eval or training_args.do_predict):
        training_args.do_train = training_args.do_eval = training_args.do_predict = True


def warn_of_ignored(training_args: Any, *others: Any) -> None:
    """Name the arguments that the method of this run does not read."""
    method = METHODS[training_args.method]
    names = ignored_flags(method, training_args, *others)
    if training_args.calibration_samples is not None and not training_args.holds_out:
        names.append("calibration_samples")
    if names:
        logger.warning("--method %s ignores %s", method.name, ", ".join(f"--{name}" for name in names))


def default_output_dir(training_args: Any, dataset: str, adapter: str | None = None) -> None:
    """Without --output_dir: a folder under runs/ named after the data and the settings one varies most.

    The evaluation of a named adapter goes into the adapter's own folder, or for a Hub repo into one of its name.
    """
    if training_args.output_dir != "trainer_output":  # transformers' default
        return
    if adapter is not None and not training_args.do_train:
        training_args.output_dir = adapter if os.path.isdir(adapter) else os.path.join("runs", Path(adapter).name)
    else:
        parts = [dataset, training_args.method]
        if METHODS[training_args.method].variational:
            parts += [f"beta{training_args.beta or BlobConfig.prior_std:g}", f"gamma{training_args.gamma:g}"]
        training_args.output_dir = os.path.join("runs", "-".join([*parts, f"seed{training_args.seed}"]))


def claim_output_dir(training_args: Any, *others: Any) -> None:
    """Write the settings of this run into its folder, unless the folder holds a run of different settings.

    Raises:
        BlobError: naming the settings that differ. Nothing in the folder is touched.
    """
    settings = {name: getattr(training_args, name) for name in DEFINING}
    for arguments in others:
        settings.update(dataclasses.asdict(arguments))
    folder = Path(training_args.output_dir)
    known = (folder / SETTINGS_FILE).is_file()
    if not known and (
        (folder / "adapter_config.json").is_file() or (folder.is_dir() and get_last_checkpoint(str(folder)))
    ):
        raise BlobError(
            f"{folder} holds a run whose settings are unknown (no {SETTINGS_FILE}); choose another --output_dir"
        )
    claim_folder(folder, settings, training_args.should_save)


def claim_folder(folder: Path, settings: Mapping[str, Any], write: bool = True) -> None:
    """Write settings into a folder, unless it has others.

    Raises:
        BlobError: naming the settings that differ. Nothing in the folder is touched.
    """
    settings = json.loads(json.dumps(settings, default=str))
    path = folder / SETTINGS_FILE
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if old.get(name) != settings[name]]
        if changed:
            shown = ", ".join(f"{name} {old.get(name)!r} -> {settings[name]!r}" for name in changed[:5])
            raise BlobError(f"{folder} holds a run of different settings ({shown}); choose another --output_dir")
    if write:
        files.write_text(path, json.dumps(settings, indent=2) + "\n")


def setup_logging(training_args: Any) -> None:
    """Show the package's log on the main process; keep the libraries at warnings."""
    level = logging.INFO if training_args.should_log else logging.ERROR
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("blob_hf").setLevel(level)
    transformers.utils.logging.set_verbosity_warning()
