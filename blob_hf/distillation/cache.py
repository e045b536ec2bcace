"""What a teacher has answered, kept in files: a kill, a second run or another process does not ask it again.

A shard holds the rows of one block. Its name is a hash of the teacher, of the samples and of the rows themselves, so a
shard is never stale: what is asked otherwise has another name. Blocks depend on the rows alone, neither on the number
of processes nor on where a run has stopped, and what comes out of a file is what went in, to the bit.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from blob_hf.utils.errors import BlobError
from blob_hf.utils.files import is_full_disk

Shard = dict[str, Tensor]
Ask = Callable[[Sequence[int]], Shard]  # indices of rows -> what the teacher says of them, by name


class TargetCache:
    """Shards in a folder, made where they are missing.

    Args:
        folder: For the files, made if needed; None keeps nothing (every process then asks for all blocks).
        key: What the answers depend on beside the rows: the teacher's files, samples, seed ...
    """

    def __init__(self, folder: str | os.PathLike[str] | None, key: Mapping[str, object]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.key = json.dumps(key, sort_keys=True, default=str)
        self.asked = 0  # rows that the teacher was asked for, in this process

    def name(self, contents: Sequence[bytes]) -> str:
        """Of the shard of these rows, given what each consists of."""
        digest = hashlib.sha256(self.key.encode())
        for content in contents:
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()[:32]

    def answers(self, contents: Sequence[bytes], size: int, ask: Ask, what: str = "teacher") -> list[Shard]:
        """The answers to all rows, a shard for each block of `size` rows in their order, on every process.

        Args:
            contents: What each row consists of.
            ask: The teacher.
            what: For the progress bar.

        Raises:
            BlobError: The folder cannot be written.
        """
        state = PartialState()
        blocks = [range(start, min(start + size, len(contents))) for start in range(0, len(contents), size)]
        if self.folder is None:
            return [self._asked(block, ask) for block in blocks]
        files = [self.folder / f"{self.name([contents[row] for row in block])}.safetensors" for block in blocks]
        missing = [number for number, file in enumerate(files) if _read(file) is None]
        own = missing[state.process_index :: state.num_processes]  # the same list everywhere: nobody has written yet
        state.wait_for_everyone()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for number in tqdm(own, desc=what, disable=None if state.is_main_process else True):
                _write(files[number], self._asked(blocks[number], ask))
        except (OSError, SafetensorError) as error:
            if not (isinstance(error, OSError) or is_full_disk(error)):
                raise
            raise BlobError(f"cannot write {self.folder} ({error}); what is there is kept, run it again") from error
        state.wait_for_everyone()
        found = [_read(file) for file in files]
        if None in found:
            raise BlobError(
                f"{files[found.index(None)]} cannot be read back; is {self.folder} shared by all processes?"
            )
        return [shard for shard in found if shard is not None]

    def _asked(self, block: Sequence[int], ask: Ask) -> Shard:
        self.asked += len(block)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in ask(block).items()}


def _read(file: Path) -> Shard | None:
    """A shard; None if there is none, or one that was damaged."""
    if not file.is_file():
        return None
    try:
        return load_file(file)
    except SafetensorError:
        return None


def _write(file: Path, shard: Shard) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f"_{file.name}.{os.getpid()}")
    try:
        save_file(shard, temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
