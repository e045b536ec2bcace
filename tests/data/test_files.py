"""Files of every kind, as users have them: what is read, and the one line about what cannot be."""

import csv
import gzip
import io

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from blob_hf.data.loading import load_files, load_hub
from blob_hf.utils.errors import BlobError


def read(tmp_path, name, content, delimiter=None):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_files({"train": str(file)}, delimiter)["train"].to_list()


def test_lines_end_where_csv_has_them(tmp_path):
    odd = "a\u2028b\x0bc\x85d"
    assert read(tmp_path, "x.csv", f'text\n{odd}\n"two\nlines"\n"raw" quote, here\n')[0]["text"] == odd
    assert [row["text"] for row in read(tmp_path, "y.csv", f'text\n{odd}\n"two\nlines"\n')] == [odd, "two\nlines"]
    quoted = read(tmp_path, "z.csv", 'text,label\n"a,1\nb",0\n')
    assert quoted == [{"text": "a,1\nb", "label": 0}]


ROWS = [("Hello, you; there", 1), ('she said "no" | left', 0), ("two\nlines", 1), ("NA", 0), ("a\tb", 1)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_delimiter_is_found_whatever_the_texts_hold(tmp_path, delimiter, encoding):
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows([(" text ", "label"), *ROWS])
    found = read(tmp_path, "x.csv", buffer.getvalue().encode(encoding))
    assert found == [{"text": text, "label": label} for text, label in ROWS]


def test_cells_are_what_they_are(tmp_path):
    found = read(tmp_path, "x.csv", ",text,a,b,c,d,e\n0,null,1,1.5,TRUE,007,\n1,007,2,2,false,1,x\n\n")
    assert found == [
        {"text": "null", "a": 1, "b": 1.5, "c": True, "d": "007", "e": None},
        {"text": "007", "a": 2, "b": 2.0, "c": False, "d": "1", "e": "x"},
    ]


def test_a_long_text_and_raw_quotes_of_glue_files(tmp_path):
    assert len(read(tmp_path, "long.csv", f"text,label\n{'x' * 200_000},1\n")[0]["text"]) == 200_000
    raw = 'sentence\tlabel\n"Hello" he said\t1\nhe said "no\t0\n"what\t1\n'
    found = read(tmp_path, "raw.tsv", raw)
    assert [row["sentence"] for row in found] == ['"Hello" he said', 'he said "no', '"what']
    assert read(tmp_path, "z.tsv.gz", gzip.compress(raw.encode())) == found


def test_a_delimiter_that_is_given(tmp_path):
    assert read(tmp_path, "x.csv", "text~label\na,b~1\n", "~") == [{"text": "a,b", "label": 1}]
    assert read(tmp_path, "x.csv", "text,x\tlabel\na,b\t1\n", "tab") == [{"text,x": "a,b", "label": 1}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "text,label\na\n", "line 2 has 1 cells, but the header has 2 \\(text, label\\).*name the delimiter"),
        ("x.csv", "text,label\ngood, really,1\n", "line 2 has 3 cells"),
        ("x.csv", "text,label\n", "has a header \\(text, label\\) and no rows"),
        ("x.csv", "", "--train_file .*x.csv is empty"),
        ("x.csv", "\n \n", "--train_file .*x.csv is empty"),
        ("x.csv", "text,label,text\na,1,b\n", "two columns called 'text'"),
        ("x.csv", "text,label\n\nok,1\ncaf\u00e9,0\n".encode("latin-1"), "not UTF-8 \\(byte 0xe9 in line 4\\)"),
        ("x.jsonl", '{"text": "caf\u00e9"}\n'.encode("latin-1"), "not UTF-8 \\(byte 0xe9 in line 1\\)"),
        ("x.jsonl", '{"text": "a"}\n{"text" "b"}\n', "line 2 is not JSON"),
        ("x.csv.gz", "text,label\n", "cannot read .*x.csv.gz as csv"),
        ("x.parquet", "no", "cannot read .*x.parquet as parquet"),
        ("x.txt", "no", "must be a .csv, .json or .jsonl file, or another of csv, tsv"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, name, content, message):
    with pytest.raises(BlobError, match=message) as error:
        read(tmp_path, name, content)
    assert "\n" not in str(error.value) and not str(error.value).startswith("cannot read x.csv as csv: x.csv")


def test_delimiters_that_are_none(tmp_path):
    for name, delimiter, message in (("x.csv", "::", "one character"), ("x.jsonl", ";", "of csv and tsv files")):
        with pytest.raises(BlobError, match=message):
            read(tmp_path, name, '{"text": "a"}\n', delimiter)


FEATURES = Features({" text ": Value("string"), "label": ClassLabel(names=["neg", "pos"])})


def test_saved_data_sets_and_parquet(tmp_path):
    rows = Dataset.from_dict({" text ": ["a", "b"], "label": [1, 0]}, features=FEATURES)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, dev=rows.select([0])).save_to_disk(tmp_path / "all")
    rows.to_parquet(tmp_path / "x.parquet")
    for path in ("one", "all", "x.parquet"):
        found = load_files({"train": str(tmp_path / path)})["train"]
        assert found.column_names == ["text", "label"] and found.features["label"].names == ["neg", "pos"]
    assert {name: len(one) for name, one in load_hub(str(tmp_path / "all"), None, "").items()} == {
        "train": 2, "validation": 1,
    }  # fmt: skip
    assert list(load_hub(str(tmp_path / "one"), None, "")) == ["train"]
    for files, message in (
        ({"test": str(tmp_path / "all")}, "has the splits train, validation, but not test"),
        ({"train": str(tmp_path)}, "a folder, but not of save_to_disk"),
    ):
        with pytest.raises(BlobError, match=message):
            load_files(files)
    with pytest.raises(BlobError, match="--dataset_config_name"):
        load_hub(str(tmp_path / "all"), "config", "")
