"""Where higher floors register what a `BlobModel` takes along: companions of its adapters, and verbs of its own.

Like PEFT's registry of tuners: what is registered is found by name, and nothing here knows what there is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor
from transformers.utils import ModelOutput

from blob_hf.utils.errors import BlobError

if TYPE_CHECKING:
    from blob_hf.tuner.model import BlobModel


class Companion:
    """Something beside an adapter's weights that is saved with it: how it was made, how it is calibrated.

    Attributes:
        slot: What it is; an adapter has at most one companion in a slot.
        files: Names (or glob patterns) of its files in the adapter's folder.
        name: What it says of the adapter, for example the name of the method that made it.
        fitted: Whether it was fitted to the finished adapter, of whatever method, and goes with it when that is
            evaluated again.
        asked_by: The model input by which a batch asks for what `answer` gives; None: it answers nothing.
    """

    slot: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str]
    fitted: ClassVar[bool] = False
    asked_by: ClassVar[str | None] = None

    def answer(self, model: "BlobModel", network: Callable[..., Any], inputs: Mapping[str, Any]) -> ModelOutput:
        """The output of a forward in the place of the network's own.

        Args:
            model: That the companion belongs to.
            network: The network's forward, as it is in this context: at the mean, noisy, or at samples.
        """
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path) -> "Companion | None":
        """Read and check it, before any model is touched; None if this adapter has none.

        Raises:
            BlobError: A file is damaged, or of something that this version does not know.
        """
        raise NotImplementedError

    def attach(self, model: "BlobModel", folder: Path) -> None:
        """Make the loaded plain LoRA, or posterior, of the active adapter what it was when it was saved."""

    def refill(self, model: "BlobModel", folder: Path) -> None:
        """Take its tensors over from another save of the same adapter (a checkpoint), after the weights."""

    def save(self, model: "BlobModel", folder: Path) -> None:
        """Write its files into a folder that holds the adapter already."""
        raise NotImplementedError

    def settings(self) -> dict[str, object]:
        """What was chosen or found, by the names that reports and model cards show."""
        return {}


Kind = TypeVar("Kind", bound=type[Companion])
_KINDS: dict[str, type[Companion]] = {}


def register_companion(kind: Kind) -> Kind:
    """Have a kind of companion looked for in every adapter that is loaded (a class decorator)."""
    _KINDS[kind.slot] = kind
    return kind


def load_companions(folder: Path) -> list[Companion]:
    """The companions that an adapter was saved with."""
    return [found for kind in _KINDS.values() if (found := kind.load(folder)) is not None]


def companion_files() -> tuple[str, ...]:
    """Names and patterns of all files that companions may have."""
    return tuple(name for kind in _KINDS.values() for name in kind.files)


@dataclass
class Verbs:
    """What a `BlobModel` does that is made on higher floors; each floor puts its own here when it is imported.

    Attributes:
        generate: A text from each posterior sample (`blob_hf.inference`).
        predict: Labels or texts with their uncertainty, for texts (`blob_hf.inference`).
        write_card: README.md of an adapter of which no run is known, into a folder (`blob_hf.trainer`).
    """

    generate: Callable[..., Tensor | ModelOutput] | None = None
    predict: Callable[..., Any] | None = None
    write_card: Callable[["BlobModel", Path], None] | None = None

    def required(self, name: str) -> Callable[..., Any]:
        """A verb that a method of `BlobModel` cannot do without.

        Raises:
            BlobError: Its floor was not imported.
        """
        verb: Callable[..., Any] | None = getattr(self, name)
        if verb is None:
            raise BlobError(f"BlobModel.{name} is made in another part of blob_hf: import blob_hf")
        return verb


VERBS = Verbs()
