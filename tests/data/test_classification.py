import gzip
import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from blob_hf.data import glue
from blob_hf.data.glue import load_classification, tokenize_classification
from blob_hf.utils.errors import BlobError

ROWS = [
    {"sentence1": "a cat", "sentence2": "an animal", "label": 1},
    {"sentence1": "a dog", "sentence2": "a plant", "label": 0},
]


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Words:
    """Stands in for a tokenizer: one id per word."""

    def __call__(self, first, second=None, truncation=True, max_length=None):
        pairs = zip(first, second or [""] * len(first), strict=True)
        return {"input_ids": [[len(word) for word in f"{a} | {b}".split()][:max_length] for a, b in pairs]}


@pytest.mark.parametrize("kind", ["jsonl", "json.gz", "csv"])
def test_own_files_of_each_kind(tmp_path, kind):
    path = tmp_path / f"train.{kind}"
    if kind == "csv":
        Dataset.from_list(ROWS).to_csv(path)
    elif kind == "jsonl":
        write(path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    data = load_classification(files={"train": str(path)})
    assert data.text_columns == ("sentence1", "sentence2") and data.label_names == ["0", "1"]
    assert data.splits["train"]["label"] == [1, 0]


def test_string_labels_get_ids_from_train(tmp_path):
    train = write(tmp_path / "t.jsonl", [{"text": "x", "kind": "spam"}, {"text": "y", "kind": "ham"}])
    bad = write(tmp_path / "v.jsonl", [{"text": "x", "kind": "eggs"}])
    data = load_classification(files={"train": train}, label_column="kind")
    assert data.label_names == ["ham", "spam"] and data.splits["train"]["label"] == [1, 0]
    assert data.text_columns == ("text",)
    with pytest.raises(BlobError, match=r"'eggs' in row 0 of validation, but the 2 classes are ham, spam"):
        load_classification(files={"train": train, "validation": bad}, label_column="kind")


def test_hub_tasks_use_train_and_validation_and_their_label_names(monkeypatch):
    features = Features(
        {
            "word": Value("string"),
            "sentence1": Value("string"),
            "sentence2": Value("string"),
            "label": ClassLabel(names=["F", "T"]),
        }
    )
    row = {"word": "bank", "sentence1": "a river bank", "sentence2": "the bank opens", "label": 0}
    splits = {name: Dataset.from_list([row], features=features) for name in ("train", "validation", "test")}
    monkeypatch.setattr(glue, "load_hub", lambda name, config, flag: DatasetDict(splits))
    data = load_classification("wic")
    assert set(data.splits) == {"train", "validation"} and data.label_names == ["F", "T"]
    ids = tokenize_classification(data, Words(), 50)["train"][0]
    assert ids == {"label": 0, "input_ids": [5, 1, 5, 4, 1, 3, 4, 5]}  # bank: a river bank | the bank opens


def test_tokenization_truncates_and_keeps_only_what_the_model_takes(tmp_path):
    data = load_classification(files={"train": write(tmp_path / "t.jsonl")})
    rows = tokenize_classification(data, Words(), 3)["train"]
    assert set(rows.column_names) == {"input_ids", "label"} and rows[0]["input_ids"] == [1, 3, 1]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"task_name": "sst2"}, "task_name must be one of rte, mrpc, cola, wic, boolq, got 'sst2'"),
        (
            ROWS,
            {"text_columns": ["premise"]},
            "no column 'premise', only sentence1, sentence2, label; set --text_columns",
        ),
        (ROWS, {"label_column": "gold"}, "no column 'gold'"),
        (ROWS, {"text_columns": ["sentence1", "sentence2", "label"]}, "one or two columns"),
        ([], {}, "is empty"),
        ([{**ROWS[0], "label": -1}, ROWS[1]], {}, "outside the range: -1"),
        ([{**ROWS[0], "label": 0.5}], {}, "labels must be integers or strings"),
    ],
)
def test_bad_input(tmp_path, rows, options, message):
    with pytest.raises(BlobError, match=message) as error:
        load_classification(files={"train": write(tmp_path / "t.jsonl", rows)}, **options)
    assert "\n" not in str(error.value)


def test_a_label_of_the_validation_file_outside_the_training_range(tmp_path):
    files = {
        "train": write(tmp_path / "t.jsonl"),
        "validation": write(tmp_path / "v.jsonl", [{**ROWS[0], "label": 2}]),
    }
    with pytest.raises(BlobError, match="2 in row 0 of validation"):
        load_classification(files=files)


def test_files_that_cannot_be_read(tmp_path):
    for path, message in (("t.txt", "must be a .csv, .json"), ("gone.jsonl", "does not exist")):
        with pytest.raises(BlobError, match=message):
            load_classification(files={"train": str(tmp_path / path)})
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    with pytest.raises(BlobError, match="cannot read"):
        load_classification(files={"train": str(tmp_path / "broken.jsonl")})


def test_without_a_hub_one_line_names_what_is_missing_and_the_ways_on():
    with pytest.raises(BlobError, match=r"cannot get the dataset 'nyu-mll/glue'.*--demo.*--train_file") as error:
        load_classification("mrpc")
    assert "\n" not in str(error.value)


OTHERS = [{"sentence": "rain falls", "label": 2}, {"sentence": "snow", "label": 0}]


def test_shifted_data_of_the_same_task_keeps_its_labels_and_other_tasks_do_not(tmp_path):
    own = load_classification(files={"train": write(tmp_path / "train.jsonl")})
    shifted, other = write(tmp_path / "shifted.jsonl"), write(tmp_path / "other.jsonl", OTHERS)
    unlabelled = write(tmp_path / "plain.jsonl", [{"text": "hello"}])
    name, data = glue.load_one_shifted(shifted, own)
    assert name == "shifted" and data.splits["shifted"]["label"] == [1, 0] and data.text_columns == own.text_columns
    name, data = glue.load_one_shifted(f"noisy={shifted}", own)
    assert name == "noisy" and "label" in data.splits["shifted"].column_names
    name, data = glue.load_one_shifted(f"cola={other}", own)
    assert name == "cola" and data.splits["shifted"].column_names == ["sentence"] and data.text_columns == ("sentence",)
    name, data = glue.load_one_shifted(unlabelled, own)
    assert name == "plain" and data.text_columns == ("text",) and "label" not in data.splits["shifted"].column_names
    assert tokenize_classification(data, Words(), 10)["shifted"].column_names == ["input_ids"]
    with pytest.raises(BlobError, match="label is outside the range: 2 in row 0 of shifted"):
        glue.load_one_shifted(other, own)
    with pytest.raises(BlobError, match="--ood_tasks must be among rte, .*got 'mnli'"):
        glue.load_one_shifted("mnli", own)
    with pytest.raises(BlobError, match=r"--ood_file nowhere.csv does not exist"):
        glue.load_one_shifted("cola=nowhere.csv", own)


def test_shifted_hub_tasks_are_their_validation_splits(monkeypatch, tmp_path):
    rows = Dataset.from_list([{"sentence": "x", "label": 1}])
    monkeypatch.setattr(glue, "load_hub", lambda *args: DatasetDict(train=rows, validation=rows))
    name, data = glue.load_one_shifted("cola", load_classification(files={"train": write(tmp_path / "train.jsonl")}))
    assert name == "cola" and data.splits["shifted"].column_names == ["sentence"]


def test_shifted_data_has_names_of_its_own(tmp_path):
    own = load_classification(files={"train": write(tmp_path / "train.jsonl")})
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "validation.jsonl"))
    with pytest.raises(BlobError, match="two sets of shifted data are called 'validation'"):
        glue.load_shifted(paths, own)
    assert list(glue.load_shifted([paths[0], f"other={paths[1]}"], own)) == ["validation", "other"]
