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

from blob_hf.utils.errors import BlobError, NonFiniteLossError

_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR)
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
    sys.stderr.write(f"error: {message}\n")  # in one write: processes that fail together share the terminal


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


@contextmanager
def user_errors(go_on: str = _GO_ON) -> Iterator[None]:
    """Print a user's mistake as one line on stderr (main process only) and exit with 2.

    The same when another process of the run has died: then this one cannot go on.

    Args:
        go_on: How the run can.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop_with(go_on))
    try:
        yield
    except BlobError as error:
        if int(os.environ.get("RANK", "0")) == 0 or isinstance(error, NonFiniteLossError):  # one rank may see it alone
            _say(str(error))
        sys.exit(2)
    except RuntimeError as error:
        if not any(part in str(error) for part in _LOST_PEER):
            raise
        _say(f"another process of this run has died ({_first_line(error)}); {go_on}")
        sys.exit(2)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        where = f" to {error.filename}" if error.filename else ""
        _say(f"cannot write{where} ({error.strerror}); choose another --output_dir or make room")
        sys.exit(2)


def setup_logging(is_main: bool, quiet_libraries: bool = False) -> None:
    """Show the package's log on the main process; of the libraries warnings, or with `quiet_libraries` errors alone."""
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("blob_hf").setLevel(logging.INFO if is_main else logging.ERROR)
    if quiet_libraries:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    else:
        transformers.utils.logging.set_verbosity_warning()
