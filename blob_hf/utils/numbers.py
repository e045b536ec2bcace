"""An argument that is a number, or a word that stands for one still to be found."""

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    NumberOrWord: TypeAlias = float | str
else:

    class NumberOrWord:
        """Parses "0.002" to 0.002 and "auto" to "auto" (argument parsers call the type of a field)."""

        def __new__(cls, text: str | float) -> float | str:
            try:
                return float(text)
            except ValueError:
                return text
