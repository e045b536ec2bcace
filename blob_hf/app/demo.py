"""Adapters for `blob app --demo`: the scripts' own demos, trained once on this machine."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from blob_hf.data.demo import BACKBONE_DIR, CLASSIFICATION_FILES, SUMMARIZATION_FILES
from blob_hf.utils.errors import BlobError
from blob_hf.version import __version__

_COMMANDS = {
    "classifier": ("classify", "--compare_lora", "false"),
    "summarizer": ("summarize", "--compare_base", "false", "--do_predict", "false"),
}


def demo_cache() -> Path:
    """Where they are kept: for each version and each state of the embedded data its own folder."""
    digest = hashlib.sha256()
    files = [*CLASSIFICATION_FILES.values(), *SUMMARIZATION_FILES.values(), BACKBONE_DIR / "model.safetensors"]
    for path in files:
        digest.update(path.read_bytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "blob_hf" / "demo" / f"{__version__}-{digest.hexdigest()[:12]}"


def demo_run(kind: str, cache: Path | None = None) -> Path:
    """The run folder of a demo, trained now if it is not there yet.

    Args:
        kind: "classifier" or "summarizer".
        cache: Default `demo_cache()`.

    Raises:
        BlobError: The training failed.
    """
    folder = (cache or demo_cache()) / kind
    if (folder / "adapter_config.json").is_file():
        return folder
    training = folder.with_name(f"{kind}-{os.getpid()}")
    command = [sys.executable, "-m", "blob_hf", *_COMMANDS[kind], "--demo", "--output_dir", str(training)]
    print(f"training the demo's {kind} once (about a minute); it is kept in {folder}", flush=True)
    log = training.with_name(f"{training.name}.log")
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("w", encoding="utf-8")
    except OSError as error:
        raise BlobError(
            f"cannot write to {log.parent} ({error.strerror}); set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    with file:
        own = {"OMP_NUM_THREADS": "1", **os.environ}  # tiny models: more threads are slower, and two train at once
        ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, env=own)
    if ended.returncode:
        raise BlobError(f"the demo's {kind} could not be trained; {log} says why")
    try:
        training.replace(folder)
    except OSError:  # another process has put its own there meanwhile
        shutil.rmtree(training, ignore_errors=True)
    log.unlink()
    return folder
