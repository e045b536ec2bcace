"""Labels as a file has them (names, numbers, booleans) to class ids, by the names of the classes."""

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset, Value

from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

_WHOLE = re.compile(r"-?(0|[1-9]\d*)\.0+")
HIDDEN = -1  # the label of a row whose class is not published
SHOWN = 20
Names: TypeAlias = list[str | None]


def read_names(rows: Dataset, column: str, split: str) -> Names:
    """The name of each row's class, None where it has none: numbers and booleans as they are written.

    Raises:
        BlobError: The labels are neither names nor whole numbers nor booleans, or hidden in some rows.
    """
    feature = rows.features[column]
    values: list[Any] = list(rows[column])
    if isinstance(feature, ClassLabel):
        return [None if value is None or value == HIDDEN else feature.int2str(value) for value in values]
    names = [_name(value, column, split) for value in values]
    hidden = names.count(str(HIDDEN))
    if hidden and any(name not in (str(HIDDEN), None) for name in names):
        raise BlobError(
            f"{hidden} of {len(names)} labels in column {column!r} of {split} are {HIDDEN}, which stands for a hidden "
            "label; give that class a name or another number"
        )
    return [None if name == str(HIDDEN) else name for name in names]


def _name(value: object, column: str, split: str) -> str | None:
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if not value.is_integer():
            raise BlobError(
                f"labels must be integers or strings, got {value!r} in column {column!r} of {split}: regression is not "
                "classification"
            )
        value = int(value)
    if value is None or isinstance(value, (bool, int)):
        return None if value is None else str(value)
    if not isinstance(value, str):
        raise BlobError(
            f"labels must be integers or strings, got a {type(value).__name__} in column {column!r} of {split}; a row "
            "has one class here"
        )
    name = value.strip()
    return _whole(name) if name else None


def _whole(name: str) -> str:
    """A whole number that is written as 1.0, as 1."""
    return name.partition(".")[0] if _WHOLE.fullmatch(name) else name


def are_numbers(names: Sequence[str]) -> bool:
    """Whether classes are called by numbers."""
    return all(name.removeprefix("-").isdigit() for name in names)


def unnamed(count: int) -> list[str]:
    """What classes without names are called: their ids."""
    return [str(index) for index in range(count)]


def class_names(splits: Mapping[str, Dataset], labels: Mapping[str, Names], column: str) -> list[str]:
    """Names of the classes in the order of their ids: the data set's own, or those in train (else in all splits).

    Raises:
        BlobError: train has but one class.
    """
    first = "train" if "train" in labels else next(iter(labels))
    feature = splits[first].features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    seen = labels["train"] if "train" in labels else [name for own in labels.values() for name in own]
    counts = Counter(name for name in seen if name is not None)
    if "train" in labels and len(counts) == 1:
        raise BlobError(
            f"every row of train has the label {next(iter(counts))!r}; a classifier needs two classes or more"
        )
    if "train" in labels and len(counts) > max(SHOWN, len(seen) // 2):
        logger.warning(
            "%d rows of train have %d different labels in column %r: is it the column of the classes?",
            len(seen), len(counts), column,
        )  # fmt: skip
    return sorted(counts, key=int) if are_numbers(list(counts)) else sorted(counts)


def settle_names(found: list[str], known: int) -> list[str]:
    """Names of the classes of an adapter that says only how many it has.

    Raises:
        BlobError: The data has another number of classes, and they are not numbers.
    """
    if are_numbers(found) and all(0 <= int(name) < known for name in found):
        return unnamed(known)
    if len(found) != known:
        raise BlobError(
            f"the adapter has {known} classes but not their names, and the data has {len(found)}: {shown(found)}; give "
            "also the file that it was trained on as --train_file, which has them all"
        )
    logger.warning("the adapter does not name its classes; they are taken to be those of the data: %s", shown(found))
    return found


def encode(names: Names, classes: Sequence[str], split: str, feature: Any = None) -> list[int]:
    """Class ids of the labels of a split, which may have fewer classes than there are.

    Numbers where the classes have names are taken as ids, and so are names or booleans where the classes have none.

    Args:
        names: From `read_names`, none of them None.
        classes: Names in the order of their ids.
        feature: The labels' own, which may know ids.

    Raises:
        BlobError: naming the labels that are no class.
    """
    ids = {name: index for index, name in enumerate(classes)}
    used = dict.fromkeys(name for name in names if name is not None)
    strange = [name for name in used if name not in ids]
    if strange:
        ids = _by_position(list(used), classes, feature) or ids
        strange = [name for name in used if name not in ids]
    if strange:
        row = names.index(strange[0])
        others = f" (also {', '.join(map(repr, strange[1:6]))}{' ...' if len(strange) > 6 else ''})" * (
            len(strange) > 1
        )
        raise BlobError(
            f"unknown class {strange[0]!r} in row {row} of {split}{others}; the {len(classes)} classes are "
            f"{shown(classes)}"
        )
    return [ids[name] for name in names if name is not None]


def _by_position(used: Sequence[str], classes: Sequence[str], feature: Any) -> dict[str, int] | None:
    """What labels mean as ids, where names and numbers meet."""
    if isinstance(feature, ClassLabel):
        same = list(classes) == unnamed(feature.num_classes)
        return {name: index for index, name in enumerate(feature.names)} if same else None
    if are_numbers(used) and not are_numbers(classes) and all(0 <= int(name) < len(classes) for name in used):
        meant = ", ".join(f"{index} = {name}" for index, name in enumerate(classes[:SHOWN]))
        logger.warning("the labels are numbers, taken as class ids: %s", meant)
        return {name: int(name) for name in used}
    if isinstance(feature, Value) and feature.dtype == "bool" and list(classes) == unnamed(2):
        return {"False": 0, "True": 1}
    return None


def shown(names: Sequence[str]) -> str:
    """Names in one line, not more than fit."""
    return ", ".join(names[:SHOWN]) + (f" ... ({len(names)} in all)" if len(names) > SHOWN else "")
