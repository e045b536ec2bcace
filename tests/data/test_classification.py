import gzip
import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from blob_hf.data import classification
from blob_hf.data.classification import load_classification, tokenize_classification, with_names
from blob_hf.data.tasks import TASKS
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
    with pytest.raises(BlobError, match=r"unknown class 'eggs' in row 0 of validation; the 2 classes are ham, spam"):
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
    monkeypatch.setattr(classification, "load_hub", lambda name, config, flag: DatasetDict(splits))
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
        (ROWS, {"task_name": "snli"}, "task_name must be one of rte, mrpc, .*, got 'snli'"),
        (ROWS, {"task_name": "stsb"}, "stsb is no task for a classifier of texts: it is regression"),
        (ROWS, {"task_name": "copa"}, "it is multiple choice"),
        (
            ROWS,
            {"text_columns": ["premise"]},
            "no column 'premise', only sentence1, sentence2, label; set text_columns",
        ),
        (ROWS, {"label_column": "gold"}, "no column 'gold'"),
        (ROWS, {"text_columns": ["sentence1", "sentence2", "label"]}, "one or two columns"),
        ([], {}, "is empty"),
        ([{**ROWS[0], "label": -1}, ROWS[1]], {}, "1 of 2 labels in column 'label' of train are -1"),
        ([{**ROWS[0], "label": 0.5}], {}, "labels must be integers or strings, got 0.5"),
        ([{**ROWS[0], "label": [1]}], {}, "labels must be integers or strings, got a list"),
        ([ROWS[0]], {}, "every row of train has the label '1'"),
        ([ROWS[0], {**ROWS[1], "label": None}], {}, "row 1 of train has no label in column 'label' .1 of 2 rows"),
        ([{"title": "a", "body": "b", "label": 1}], {}, "several columns could be the texts: title, body; .*text_co"),
        ([{**ROWS[0], "text": "c"}], {}, "several columns could be the texts: sentence1, sentence2, text"),
        ([{"a": 1, "label": 1}], {}, "no column has texts"),
        ([{"a": 1, "label": 1}], {"text_columns": ["a"]}, "holds int64, not texts"),
        ([{**ROWS[0], "sentence1": None}, ROWS[1]], {}, "row 0 of train has no text in column 'sentence1'"),
        (ROWS, {"dataset": ("x", None)}, "--dataset_name and --train_file are both given"),
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
    with pytest.raises(BlobError, match="unknown class '2' in row 0 of validation"):
        load_classification(files=files)


def test_files_that_cannot_be_read(tmp_path):
    for path, message in (("t.txt", "must be a .csv, .json"), ("gone.jsonl", "does not exist")):
        with pytest.raises(BlobError, match=message):
            load_classification(files={"train": str(tmp_path / path)})
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    with pytest.raises(BlobError, match="cannot read"):
        load_classification(files={"train": str(tmp_path / "broken.jsonl")})


def test_without_a_hub_one_line_names_what_is_missing_and_the_ways_on():
    with pytest.raises(BlobError, match=r"cannot get the dataset 'nyu-mll/glue'.*--train_file.*--demo") as error:
        load_classification("mrpc")
    assert "\n" not in str(error.value)


OTHERS = [{"sentence": "rain falls", "label": 2}, {"sentence": "snow", "label": 0}]


def test_shifted_data_of_the_same_task_keeps_its_labels_and_other_tasks_do_not(tmp_path):
    own = load_classification(files={"train": write(tmp_path / "train.jsonl")})
    shifted, other = write(tmp_path / "shifted.jsonl"), write(tmp_path / "other.jsonl", OTHERS)
    unlabelled = write(tmp_path / "plain.jsonl", [{"text": "hello"}])
    name, data = classification.load_one_shifted(shifted, own)
    assert name == "shifted" and data.splits["shifted"]["label"] == [1, 0] and data.text_columns == own.text_columns
    name, data = classification.load_one_shifted(f"noisy={shifted}", own)
    assert name == "noisy" and "label" in data.splits["shifted"].column_names
    name, data = classification.load_one_shifted(f"cola={other}", own)
    assert name == "cola" and data.splits["shifted"].column_names == ["sentence"] and data.text_columns == ("sentence",)
    name, data = classification.load_one_shifted(unlabelled, own)
    assert name == "plain" and data.text_columns == ("text",) and "label" not in data.splits["shifted"].column_names
    assert tokenize_classification(data, Words(), 10)["shifted"].column_names == ["input_ids"]
    with pytest.raises(BlobError, match="unknown class '2' in row 0 of shifted"):
        classification.load_one_shifted(other, own)
    with pytest.raises(BlobError, match="--ood_tasks must be among rte, .*got 'snli'"):
        classification.load_one_shifted("snli", own)
    with pytest.raises(BlobError, match=r"--ood_file nowhere.csv does not exist"):
        classification.load_one_shifted("cola=nowhere.csv", own)


def test_shifted_hub_tasks_are_their_validation_splits(monkeypatch, tmp_path):
    rows = Dataset.from_list([{"sentence": "x", "label": 1}, {"sentence": "y", "label": 0}])
    monkeypatch.setattr(classification, "load_hub", lambda *args: DatasetDict(train=rows, validation=rows))
    name, data = classification.load_one_shifted(
        "cola", load_classification(files={"train": write(tmp_path / "train.jsonl")})
    )
    assert name == "cola" and data.splits["shifted"].column_names == ["sentence"]


def test_shifted_data_has_names_of_its_own(tmp_path):
    own = load_classification(files={"train": write(tmp_path / "train.jsonl")})
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "validation.jsonl"))
    with pytest.raises(BlobError, match="two sets of shifted data are called 'validation'"):
        classification.load_shifted(paths, own)
    assert list(classification.load_shifted([paths[0], f"other={paths[1]}"], own)) == ["validation", "other"]


def jsonl(path, labels, text="a"):
    rows = [{"id": f"r{i}", "text": f"{text} {i}", "label": label, "channel": "web"} for i, label in enumerate(labels)]
    return write(path, [{k: v for k, v in row.items() if k != "label" or v is not ...} for row in rows])


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        ([True, False], ["False", "True"], [1, 0]),
        ([1.0, 0.0], ["0", "1"], [1, 0]),
        (["1", "0"], ["0", "1"], [1, 0]),
        ([10, 2, 5], ["2", "5", "10"], [2, 0, 1]),
        ([" yes", "no "], ["no", "yes"], [1, 0]),
    ],
)
def test_labels_of_every_kind(tmp_path, labels, names, ids):
    data = load_classification(files={"train": jsonl(tmp_path / "t.jsonl", labels)})
    assert data.label_names == names and data.splits["train"]["label"] == ids
    assert data.text_columns == ("text",) and "not read: channel" in data.describe()


def test_what_is_read_is_said(tmp_path):
    files = {"train": jsonl(tmp_path / "t.jsonl", ["yes", "no", "no"]), "test": jsonl(tmp_path / "u.jsonl", [...])}
    assert load_classification(files=files).describe() == (
        "texts: text; labels: label, 2 classes (no 2, yes 1); rows: train 3, test 1 (no labels); not read: channel"
    )


@pytest.mark.parametrize("labels", [[..., ...], [None, None], ["", ""], [-1, -1]])
def test_a_test_file_without_labels(tmp_path, labels):
    files = {"train": jsonl(tmp_path / "t.jsonl", ["yes", "no"]), "test": jsonl(tmp_path / "u.jsonl", labels)}
    data = load_classification(files=files)
    assert "label" not in data.splits["test"].column_names
    assert data.inputs("test")[1] == {"id": "r1", "text": "a 1"}
    with pytest.raises(BlobError, match=r"of validation has no|column 'label', only") as error:
        load_classification(files={"train": files["train"], "validation": files["test"]})
    assert "\n" not in str(error.value)


def test_labels_are_matched_with_the_classes_of_an_adapter(tmp_path, caplog):
    some = {"test": jsonl(tmp_path / "some.jsonl", ["yes", "yes"])}
    assert load_classification(files=some, classes=["maybe", "no", "yes"]).splits["test"]["label"] == [2, 2]
    for split in ("validation", "test", "calibration", "train"):
        files = {**some, split: jsonl(tmp_path / "zero.jsonl", ["zero", "yes", "nil"])}
        with pytest.raises(BlobError, match=f"'zero' in row 0 of {split} .also 'nil'.; the 2 classes are no, yes"):
            load_classification(files=files, classes=["no", "yes"])
    ids = {"test": jsonl(tmp_path / "ids.jsonl", [1, 0])}
    assert load_classification(files=ids, classes=["no", "yes"]).splits["test"]["label"] == [1, 0]
    assert "taken as class ids: 0 = no, 1 = yes" in caplog.text
    booleans = {"test": jsonl(tmp_path / "b.jsonl", [True, False])}
    assert load_classification(files=booleans, classes=["0", "1"]).splits["test"]["label"] == [1, 0]


def test_an_adapter_that_knows_only_how_many_classes_it_has(tmp_path, caplog):
    ids = {"test": jsonl(tmp_path / "ids.jsonl", [1, 0])}
    assert load_classification(files=ids, classes=77).label_names == [str(i) for i in range(77)]
    names = {"test": jsonl(tmp_path / "n.jsonl", ["yes", "no"])}
    assert load_classification(files=names, classes=2).label_names == ["no", "yes"]
    assert "does not name its classes" in caplog.text
    with pytest.raises(BlobError, match="3 classes but not their names, and the data has 2: no, yes"):
        load_classification(files=names, classes=3)
    unlabelled = {"test": jsonl(tmp_path / "u.jsonl", [...])}
    assert load_classification(files=unlabelled, classes=2).label_names == ["0", "1"]
    with pytest.raises(BlobError, match="there are no labels"):
        load_classification(files=unlabelled)


def test_a_base_model_that_knows_the_classes(tmp_path):
    named = load_classification(files={"train": jsonl(tmp_path / "t.jsonl", ["yes", "no"])})
    ordered = with_names(named, ["yes", "no"])
    assert ordered.label_names == ["yes", "no"] and ordered.splits["train"]["label"] == [0, 1]
    assert with_names(named, ["pos", "neg"]) is named and with_names(named, None) is named
    numbered = load_classification(files={"train": jsonl(tmp_path / "n.jsonl", [1, 0])})
    assert with_names(numbered, ["neg", "pos"]).label_names == ["neg", "pos"]
    assert with_names(numbered, ["neg", "pos"]).splits["train"]["label"] == [1, 0]


def test_every_named_task_has_its_own_splits(monkeypatch):
    """The columns and splits of the Hub's GLUE and SuperGLUE."""
    names = {"mnli": ("validation_matched", "test_matched")}
    for name, task in TASKS.items():
        validation, test = names.get(name, ("validation", "test"))
        columns = [*task.text_columns, *([task.word_column] if task.word_column else [])]
        features = Features({**{c: Value("string") for c in columns}, "label": ClassLabel(names=["A", "B", "C"])})

        def split(text, label, columns=columns, features=features):
            return Dataset.from_list([{**dict.fromkeys(columns, text), "label": label}], features=features)

        hub = DatasetDict({"train": split("t", 0), validation: split("v", 2), test: split("x", -1)})
        hub["validation_mismatched"] = split("mm", 1)
        monkeypatch.setattr(classification, "load_hub", lambda *args, hub=hub: hub)
        data = load_classification(name, with_test=True)
        assert {s: rows[task.text_columns[0]][0] for s, rows in data.splits.items()} == {
            "train": "t", "validation": "v", "test": "x",
        }  # fmt: skip
        assert data.splits["validation"]["label"] == [2] and "label" not in data.splits["test"].column_names
        assert set(load_classification(name).splits) == {"train", "validation"}
