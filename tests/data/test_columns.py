import pytest
from datasets import Dataset

from blob_hf.data.columns import chosen_columns
from blob_hf.utils.errors import BlobError

ROWS = Dataset.from_dict({"a": ["x"], "b": ["y"], "gold": ["z"], "text": ["w"]})


@pytest.mark.parametrize(
    ("named", "read"),
    [(["b", "a"], ("b", "a")), (("gold",), ("gold",)), (None, ("text",)), ([], ("text",))],
)
def test_named_columns_are_read_as_named_else_those_that_can_only_be_meant(named, read):
    assert chosen_columns(ROWS, named) == read


def test_what_is_no_text_is_not_chosen():
    assert chosen_columns(ROWS.remove_columns(["a", "text"]), None, ["gold"]) == ("b",)


def test_three_texts_are_refused():
    with pytest.raises(BlobError, match=r"^text_columns takes one or two columns, got a, b, text$"):
        chosen_columns(ROWS, ["a", "b", "text"])
