"""Writing files so that a crash, a full disk or a missing permission never leaves half of one."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from blob_hf.utils.errors import BlobError

_STAGING = "_saving"  # the Trainer's pushes leave out names with a leading underscore


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder inside `folder` (made if needed): its files move there when the block ends well.

    Each file replaces its namesake whole. When the block fails, nothing in `folder` has changed.

    Raises:
        BlobError: The folder or a file cannot be written (permission, full disk, not a folder).
    """
    folder = Path(folder)
    staging = folder / _STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a killed process left
        staging.mkdir(parents=True)
        yield staging
        for file in sorted(staging.iterdir()):
            _flush(file)
        for file in sorted(staging.iterdir()):
            os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8), whole or not at all; its folder is made if needed. Several processes may share it.

    Raises:
        BlobError: It cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"_{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _cannot_write(path.parent, error) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full; some libraries have words alone."""
    words = ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122")
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(part in str(error) for part in words)


def _cannot_write(folder: Path, error: Exception) -> BlobError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return BlobError(f"cannot write to {folder} ({reason}); choose another folder or make room in it")


def _flush(file: Path) -> None:
    """Have the file's content on the disk before its name is: also a power failure then leaves the old or the new."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
