"""method.json: how an adapter was made, where its files do not tell; found by the method's name when it is loaded."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from blob_hf.reporting.run_summary import MethodCard
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.registry import Companion, register_companion
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

METHOD_FILE = "method.json"
_WITHOUT_FACTS = ("blob", "lora")  # their adapters are told apart by their configuration


@register_companion
class MethodState(Companion):
    """What a method found or chose in making an adapter: a frozen dataclass for each method, saved as method.json.

    Attributes:
        name: Of the method.
        card: What the model card says of its adapters.
        required: Fields that method.json has to hold, and their types.
    """

    slot: ClassVar[str] = "method"
    files: ClassVar[tuple[str, ...]] = (METHOD_FILE,)
    card: ClassVar[MethodCard]
    required: ClassVar[Mapping[str, type | tuple[type, ...]]] = {}

    @classmethod
    def load(cls, folder: Path) -> "MethodState | None":
        """The state of the method that method.json names.

        Raises:
            BlobError: The file is damaged, or of a method that this version does not know.
        """
        facts = read_facts(folder)
        name = facts.pop("method", _WITHOUT_FACTS[0])
        if name in _WITHOUT_FACTS:
            return None
        kind: Any = find_method(name)
        for key, type_ in kind.required.items():
            if not isinstance(facts.get(key), type_):
                raise BlobError(
                    f"{folder / METHOD_FILE} is damaged: {key} of method {name} is {facts.get(key)!r}; get it again"
                )
        known = {field.name for field in dataclasses.fields(kind)}
        return kind(**{key: value for key, value in facts.items() if key in known})

    def facts(self) -> dict[str, Any]:
        """The fields, by name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def save(self, model: BlobModel, folder: Path) -> None:
        files.write_text(folder / METHOD_FILE, json.dumps({"method": self.name, **self.facts()}, indent=2) + "\n")

    def settings(self) -> dict[str, object]:
        return {
            key.replace("_", " "): value
            for key, value in self.facts().items()
            if isinstance(value, (int, float, str)) and not isinstance(value, bool)
        }


Kind = TypeVar("Kind", bound=type[MethodState])
_METHODS: dict[str, type[MethodState]] = {}


def register_method(name: str) -> Callable[[Kind], Kind]:
    """Have adapters whose method.json has this name loaded with this state (a class decorator)."""

    def register(kind: Kind) -> Kind:
        kind.name = name
        _METHODS[name] = kind
        MethodState.files = tuple(dict.fromkeys((*MethodState.files, *kind.files)))  # one slot: any method's files
        return kind

    return register


def method_names() -> tuple[str, ...]:
    """Every method that an adapter may be of."""
    return (*_WITHOUT_FACTS, *_METHODS)


def find_method(name: str) -> type[MethodState]:
    """The state of the method of a name.

    Raises:
        BlobError: There is none, or not in this version.
    """
    if name not in _METHODS:
        raise BlobError(f"method must be one of {', '.join(method_names())}, got {name!r}")
    return _METHODS[name]


def read_facts(folder: Path) -> dict[str, Any]:
    """What method.json holds, an empty dict without one.

    Raises:
        BlobError: The file is damaged.
    """
    file = folder / METHOD_FILE
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(facts["method"], str):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise BlobError(f"{file} is damaged: it does not name a method; get it again") from error
    return facts
