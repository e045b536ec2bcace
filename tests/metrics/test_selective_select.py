"""What a threshold on the uncertainty does, counted by hand."""

import math

import pytest

from blob_hf.metrics.selective import select
from blob_hf.utils.errors import BlobError


def test_a_threshold_answers_what_is_not_above_it():
    doubts, wrong = [0.1, 0.4, 0.4, 0.9], [0, 1, 0, 1]
    at = select(doubts, wrong, 0.4)
    assert (at.answered, at.coverage, at.risk) == (3, 0.75, pytest.approx(1 / 3))
    assert select(doubts, wrong, math.inf).risk == 0.5
    nothing = select(doubts, wrong, 0.05)
    assert (nothing.answered, nothing.coverage) == (0, 0.0) and math.isnan(nothing.risk)
    with pytest.raises(BlobError, match="one uncertainty and one risk"):
        select([0.1], [0, 1], 0.5)
