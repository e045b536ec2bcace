"""On which words texts agree, by hand."""

import numpy as np
import pytest

from blob_hf.metrics.agreement import closest_call, marked, word_agreement


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


def test_the_closest_call_is_the_text_with_fewest_open_words():
    texts = ["all agree here", "on Monday at six", "on Monday they left"]
    half = [["on Friday at six", "on Monday at six"], ["on Friday he left", "on Monday they left"]]
    assert closest_call(texts, [["all agree here"] * 2, *half]) == 1
    assert closest_call(texts[:1], [["all agree here"]]) is None
    assert closest_call(["on Monday"], [["at ten"] * 3]) is None  # no share of others has it: not open, but wrong
