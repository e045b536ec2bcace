"""What commands that ask a saved adapter share: their flags, their processes, and what they say the adapter is."""

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from blob_hf.cli.arguments import OneLineParser
from blob_hf.tuner.adapter_files import CHAT_TEMPLATES, NAMES, TOKENIZER_FILES
from blob_hf.tuner.registry import companion_files
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError


def command_parser(name: str, doc: str | None) -> OneLineParser:
    """The parser of `blob NAME`, without arguments.

    Args:
        doc: Of the command's module: its first paragraph is what --help says.
    """
    return OneLineParser(
        prog=f"blob {name}", description=(doc or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip


def add_columns(own: argparse.ArgumentParser, else_read: str = "those that can only be meant") -> None:
    """How files are read: --delimiter and --text_columns.

    Args:
        else_read: Which columns are read where none are named.
    """
    own.add_argument("--delimiter", help="of csv files; default: found in the file")
    own.add_argument("--text_columns", nargs="+", help=f"one or two columns; default: {else_read}")


def add_layers(own: argparse.ArgumentParser) -> None:
    """Which layers are sampled: --layers."""
    own.add_argument("--layers", type=int, help="samples differ in the last so many layers, the rest is computed once")


def add_asking(own: argparse.ArgumentParser, seeded: str, batch_size: int, batched: str = "rows together") -> None:
    """How the adapter's networks are asked: --seed, --posterior_batch_size, --batch_size and --max_length.

    Args:
        seeded: What the seed stands for.
        batch_size: Default.
        batched: What a batch is.
    """
    own.add_argument("--seed", type=int, default=Sampling.seed, help=seeded)
    own.add_argument("--posterior_batch_size", type=int, help="samples together, to bound memory")
    own.add_argument("--batch_size", type=int, default=batch_size, help=batched)
    own.add_argument("--max_length", type=int, help="longest input in tokens; default: what the model takes")


def refuse_of_writers(args: argparse.Namespace, own: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Refuse flags that only models that write look at.

    Args:
        own: The parser that the arguments are of.
        names: Of these flags.

    Raises:
        BlobError: One is not at its default.
    """
    for name in names:
        if getattr(args, name) != own.get_default(name):
            raise BlobError(f"--{name} is for models that write; {args.adapter} tells classes apart: leave it out")


def processes() -> PartialState:
    """This process among all; accelerate joins those that torchrun has started without a GPU only if it is told to."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return PartialState() if alone or torch.cuda.is_available() else PartialState(cpu=True)


def fingerprint(folder: Path) -> str:
    """SHA-256 of all that an adapter consists of."""
    digest = hashlib.sha256()
    found = {
        path for name in (*NAMES, *companion_files(), *TOKENIZER_FILES, *CHAT_TEMPLATES) for path in folder.glob(name)
    }
    for path in sorted(found):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
