"""On which words texts agree, by hand."""

import numpy as np
import pytest

from blob_hf.metrics.agreement import marked, word_agreement


def test_shares_by_hand():
    words, shares = word_agreement("we meet on Monday at six", ["we meet on Friday at six", "we meet on Monday at six"])
    assert words == ["we", "meet", "on", "Monday", "at", "six"]
    np.testing.assert_array_equal(shares, [1, 1, 1, 0.5, 1, 1])


def test_a_word_more_does_not_move_the_rest():
    _, shares = word_agreement("we meet on Monday at six", ["today we meet on next Monday at six"])
    assert shares.min() == 1


def test_nothing_in_common():
    _, shares = word_agreement("a b", ["c d", ""])
    np.testing.assert_array_equal(shares, [0, 0])


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        (["we meet on Monday at six"], "we meet on Monday at six"),
        (["we meet on Friday at six", "we meet on Monday at six"], "we meet on [Monday](1/2) at six"),
        (["we meet on Friday at ten"] * 3, "we meet on [Monday](0/3) at [six](0/3)"),
        (["they met"], "[we meet on Monday at six](0/1)"),
    ],
)
def test_what_is_marked(others, expected):
    assert marked("we meet on Monday at six", others) == expected
