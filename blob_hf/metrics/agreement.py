"""On which words of a text other texts agree: where sampled summaries say something else than the mean's."""

from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray


def word_agreement(text: str, others: Sequence[str]) -> tuple[list[str], NDArray[np.float64]]:
    """The words of a text, and for each the share of the other texts that have it at its place.

    Places are found by aligning words (difflib: longest matching blocks), so that one word more or less does not
    move the rest.

    Args:
        others: One or more texts.

    Returns:
        Words, split at white space, and shares `(words,)` in [0, 1].
    """
    words = text.split()
    counts = np.zeros(len(words))
    for other in others:
        for block in SequenceMatcher(None, words, other.split(), autojunk=False).get_matching_blocks():
            counts[block.a : block.a + block.size] += 1
    return words, counts / len(others)


def marked(text: str, others: Sequence[str]) -> str:
    """The text with runs of words that not all others have in brackets, and the least share of them behind."""
    words, shares = word_agreement(text, others)
    out: list[str] = []
    run: list[int] = []
    for index in range(len(words) + 1):
        if index < len(words) and shares[index] < 1:
            run.append(index)
            continue
        if run:
            out.append(f"[{' '.join(words[i] for i in run)}]({round(shares[run].min() * len(others))}/{len(others)})")
            run = []
        if index < len(words):
            out.append(words[index])
    return " ".join(out)


def closest_call(texts: Sequence[str], others: Sequence[Sequence[str]]) -> int | None:
    """Index of the text whose others disagree on the fewest words, but on one of these by half: an open question.

    None where no text has a word that 30 to 70 % of its others have.
    """
    divided = []
    for index, (text, own) in enumerate(zip(texts, others, strict=True)):
        shares = word_agreement(text, own)[1]
        if len(shares) and 0.3 <= shares.min() <= 0.7:
            divided.append((int((shares < 1).sum()), index))
    return min(divided)[1] if divided else None
