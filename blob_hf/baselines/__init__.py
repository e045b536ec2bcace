"""The peers of BLoB behind one interface: maximum likelihood, MAP, MC dropout, ensembles, Laplace and TFB."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from blob_hf.baselines.base import Method
from blob_hf.baselines.blob import Blob
from blob_hf.baselines.ensemble import Ensemble
from blob_hf.baselines.laplace import Laplace
from blob_hf.baselines.map import Map
from blob_hf.baselines.mc_dropout import MCDropout
from blob_hf.baselines.tfb import TFB
from blob_hf.tuner.adapter_files import METHOD_FILE, is_blob_adapter
from blob_hf.utils.errors import BlobError

METHODS: dict[str, Method] = {
    method.name: method for method in (Blob(), Method(), Map(), MCDropout(), Ensemble(), Laplace(), TFB())
}


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        BlobError: There is none, or not in this version.
    """
    if name not in METHODS:
        raise BlobError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def read_facts(folder: Path) -> dict[str, Any]:
    """What method.json says, an empty dict without one.

    Raises:
        BlobError: The file is damaged, or of a method that this version does not know.
    """
    file = folder / METHOD_FILE
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        name = facts["method"]
    except (ValueError, KeyError, TypeError) as error:
        raise BlobError(f"{file} is damaged: it does not name a method; get it again") from error
    for key, kind in find_method(name).facts.items():
        if not isinstance(facts.get(key), kind):
            raise BlobError(f"{file} is damaged: {key} of method {name} is {facts.get(key)!r}; get it again")
    return facts


def require_plain(folder: Path, method: str) -> None:
    """Refuse an adapter that has a posterior or members already.

    Args:
        folder: Of the adapter.
        method: What it is needed for.

    Raises:
        BlobError: It is not a plain LoRA adapter.
    """
    name = read_facts(folder).get("method", "blob" if is_blob_adapter(folder) else "lora")
    if METHODS[name].sampled:
        raise BlobError(f"{folder} is of method {name}, with samples already; --method {method} needs plain LoRA")


def ignored_flags(method: Method, *arguments: Any) -> list[str]:
    """Arguments that are not at their defaults, but that this method does not read.

    Args:
        arguments: Dataclasses, the training arguments first.
    """
    others = frozenset().union(*(one.flags for one in METHODS.values())) - method.flags
    others |= method.unread(arguments[0])
    return [
        one.name
        for part in arguments
        for one in fields(part)
        if one.name in others and getattr(part, one.name) != one.default
    ]


__all__ = ["METHODS", "Method", "find_method", "ignored_flags", "read_facts", "require_plain"]
