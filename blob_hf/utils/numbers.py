"""An argument that is a number, or a word that stands for one still to be found."""

from typing import TYPE_CHECKING, TypeAlias


def number_or_word(value: str | float) -> float | str:
    """ "0.002" as 0.002 and "auto" as "auto"."""
    try:
        return float(value)
    except ValueError:
        return str(value)


def whole_or_word(value: str | float) -> int | str:
    """ "10" as 10 and "auto" as "auto"; a number that is not whole stays a word, for whoever refuses it."""
    found = number_or_word(value)
    return int(found) if isinstance(found, float) and found.is_integer() else str(value)


if TYPE_CHECKING:
    NumberOrWord: TypeAlias = float | str
else:

    class NumberOrWord:
        """Type of such a field of an argument dataclass: parsers call it with what the user typed."""

        def __new__(cls, value):
            return number_or_word(value)
