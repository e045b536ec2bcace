"""What a person sees in the terminal: the log, and a mistake as one line."""

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import transformers
from tqdm import tqdm

from blob_hf.cli.folders import release_locks, training_folder
from blob_hf.trainer.checkpoints import newest_complete
from blob_hf.utils.errors import BlobError, NonFiniteLossError
from blob_hf.utils.files import is_full_disk

_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.ENOTDIR)
_INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C has ended
# What gloo and NCCL say when a process they talk to is gone
_LOST_PEER = ("onnection closed by peer", "onnection reset by peer", "remote process exited", "Broken pipe")
_GO_ON = "--resume_from_checkpoint true continues from the newest complete checkpoint"


def _stop_with(go_on: str) -> Callable[[int, FrameType | None], NoReturn]:
    """Launchers end the other processes of a run with SIGTERM when one has failed."""

    def stopped(signum: int, frame: FrameType | None) -> NoReturn:
        _say(f"stopped by the launcher, because another process failed or the job ended; {go_on}")
        os._exit(128 + signum)  # not through exceptions: the process may be in the middle of a collective

    return stopped


def _say(message: str) -> None:
    # above a progress bar, and in one write: processes that fail together share the terminal
    tqdm.write(f"error: {message}\n", file=sys.stderr, end="")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _way_on() -> str:
    """What is there of a training that ends before its time, and how to go on; "" outside of one."""
    folder = training_folder()
    if folder is None:
        return ""
    newest = newest_complete(folder)
    if newest is not None:
        return f"; {newest} is complete: the same command with --resume_from_checkpoint true continues from there"
    return "; no checkpoint is complete yet (--save_steps): the same command starts anew"


@contextmanager
def user_errors(go_on: str = _GO_ON) -> Iterator[None]:
    """Print a user's mistake as one line on stderr (main process only) and exit with 2; after Ctrl-C with 130.

    The same when another process of the run has died: then this one cannot go on, and its checkpoints can. A full disk
    is one line, too.

    Args:
        go_on: How the run can.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop_with(go_on))
    try:
        yield
    except BlobError as error:
        if _is_main() or isinstance(error, NonFiniteLossError):  # one rank may see it alone
            _say(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        if _is_main():
            _say(f"interrupted{_way_on()}")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        reason = _reason(error, go_on)
        if reason is None:
            raise
        _say(reason)
        sys.exit(2)
    finally:
        release_locks()


def _reason(error: Exception, go_on: str) -> str | None:
    """One line for an error that is the machine's, not the program's; None for others."""
    if is_full_disk(error) or (isinstance(error, OSError) and error.errno in _CANNOT_WRITE):
        file = getattr(error, "filename", None)
        where = f" to {file}" if file else ""
        why = getattr(error, "strerror", None) or _first_line(error)
        return f"cannot write{where} ({why}); make room or choose another --output_dir{_way_on()}"
    if isinstance(error, RuntimeError) and any(part in str(error) for part in _LOST_PEER):
        return f"another process of this run has died ({_first_line(error)}); {go_on}"
    return None


def setup_logging(is_main: bool, quiet_libraries: bool = False) -> None:
    """Show the package's log on the main process; of the libraries warnings, or with `quiet_libraries` errors alone."""
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("blob_hf").setLevel(logging.INFO if is_main else logging.ERROR)
    if quiet_libraries:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    else:
        transformers.utils.logging.set_verbosity_warning()
