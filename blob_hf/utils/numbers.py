"""An argument that is a number, or a word that stands for one still to be found."""

from typing import TYPE_CHECKING, TypeAlias


def number_or_word(value: str | float) -> float | str:
    """ "0.002" as 0.002 and "auto" as "auto"."""
    try:
        return float(value)
    except ValueError:
        return str(value)


if TYPE_CHECKING:
    NumberOrWord: TypeAlias = float | str
else:

    class NumberOrWord:
        """Type of such a field of an argument dataclass: parsers call it with what the user typed."""

        def __new__(cls, value):
            return number_or_word(value)
