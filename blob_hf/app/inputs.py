"""What a visitor has written, checked: a mistake is a sentence on the page."""

import unicodedata

from blob_hf.utils.errors import BlobError

MOST_SAMPLES = 64
MOST_SEED = 2**31 - 1
LONGEST = 100_000  # characters; a model's own limit in tokens is far below
_ODD_SHARE = 0.1  # of characters that no text has, from which on it is something else
_KINDS = {"Cc", "Cs", "Co", "Cn"}  # control characters, halves of surrogate pairs, private and unassigned ones


def checked_text(value: object, what: str = "text") -> str:
    """A text that can be predicted for.

    Args:
        what: What it is called on the page.

    Raises:
        BlobError: It is empty, too long, or not text; in a sentence that does not repeat it.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BlobError(f"The {what} is empty: write or paste one.")
    if not isinstance(value, str):
        raise BlobError(f"The {what} must be text, not {type(value).__name__}.")
    if len(value) > LONGEST:
        raise BlobError(f"The {what} has {len(value):,} characters, and at most {LONGEST:,} are taken: shorten it.")
    odd = sum(unicodedata.category(one) in _KINDS and one not in "\n\r\t" for one in value)
    if "\0" in value or odd > _ODD_SHARE * len(value) or any("\ud800" <= one <= "\udfff" for one in value):
        raise BlobError(f"The {what} does not look like text: it has characters that no text has.")
    return value


def checked_count(value: object, what: str, lowest: int, highest: int) -> int:
    """A whole number within limits.

    Raises:
        BlobError: It is none, or outside of them.
    """
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        raise BlobError(f"{what} must be a whole number.")
    if not lowest <= value <= highest:
        raise BlobError(f"{what} must be between {lowest} and {highest}, not {value:g}.")
    return int(value)


def checked_number(value: object, what: str, lowest: float, highest: float) -> float:
    """A number within limits.

    Raises:
        BlobError: It is none, or outside of them.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value <= highest:
        raise BlobError(f"{what} must be a number between {lowest:g} and {highest:g}.")
    return float(value)
