"""The page of a run: which rows it shows when something else is chosen."""

import re

import pytest

from blob_hf.app.run_view import CLASSES, LEAST_CERTAIN, WORST, RunView, SavedPredictions, SavedRow

pytestmark = pytest.mark.slow  # Gradio takes seconds to import


def saved(split, count, scores=("entropy",)):
    """Rows of which the least certain is the first and the worst the last."""
    rows = [
        SavedRow(f"{split}{i}", "", "a", "", "a", {name: float(count - i) for name in scores}, float(i), False)
        for i in range(count)
    ]
    return SavedPredictions(split, CLASSES, tuple(rows), scores)


@pytest.fixture
def page():
    pytest.importorskip("gradio", reason="the page needs gradio")
    from blob_hf.app.pages.run import RunPage

    return RunPage(RunView("run", "", {}, (saved("validation", 60), saved("test", 30, ("entropy", "degree")))))


def names(shown):
    return re.findall(r'<th scope="row">(\w+)</th>', shown)


def test_another_split_keeps_the_order_and_begins_with_its_first_page(page):
    for order, expected in ((WORST, range(29, 4, -1)), (LEAST_CERTAIN, range(25))):
        scores, pages, _, rows = page.choose("test", order, "entropy")
        assert names(rows) == [f"test{i}" for i in expected]
        assert scores["value"] == "entropy" and list(scores["choices"]) == ["entropy", "degree"]
        assert (pages["value"], pages["maximum"]) == (1, 2)
    scores, _, _, rows = page.choose("validation", WORST, "degree")  # has no such score
    assert scores["value"] == "entropy" and names(rows)[0] == "validation59"


def test_pages_are_whole_numbers_within_the_split(page):
    assert names(page.rows("validation", WORST, None, 3)) == [f"validation{i}" for i in range(9, -1, -1)]
    for number in (0, 4, 1.5, float("nan"), None, "2"):
        said = page.rows("validation", WORST, None, number)
        assert "The page must be " in said and 'role="alert"' in said and not names(said)
