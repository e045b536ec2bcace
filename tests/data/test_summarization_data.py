import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from blob_hf.data.summarization import (
    DEFAULT_PROMPT,
    Dialogue,
    Prompt,
    generation_rows,
    group_dialogues,
    group_references,
    load_summaries,
    scoring_rows,
)
from blob_hf.utils.errors import BlobError

ROWS = [
    {"id": "test_0_1", "dialogue": "hello there", "summary": "they greet"},
    {"id": "test_0_2", "dialogue": "hello there", "summary": "a greeting"},
    {"id": "test_1_1", "dialogue": "bye now", "summary": "they part"},
    {"id": "test_1_2", "dialogue": "bye now", "summary": "a farewell"},
]


@pytest.fixture
def words():
    """A word-level tokenizer with <s> ... </s>."""
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "Dialogue", ":", "Summary", "hello", "there", "bye", "now"]
    vocabulary += ["they", "greet", "a", "greeting", "part", "farewell", *(f"w{i}" for i in range(50))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_training_scoring_and_generation_read_the_same_prompt(words):
    prompt = Prompt()
    dialogues = [Dialogue("0", "hello there", ["they greet", "a greeting"])]
    scored = scoring_rows(dialogues, words, prompt, 50, 50)
    generated = generation_rows(dialogues, words, prompt, 50)
    assert words.decode(generated[0]["input_ids"]) == "<s> Dialogue : hello there Summary : </s>"
    assert scored["input_ids"][0] == scored["input_ids"][1] == generated["input_ids"][0]
    assert [words.decode(row) for row in scored["labels"]] == ["<s> they greet </s>", "<s> a greeting </s>"]
    assert generated.column_names == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("max_length", [8, 12, 20])
def test_a_long_dialogue_is_cut_and_the_end_of_the_prompt_stays(words, max_length):
    dialogue = " ".join(f"w{i}" for i in range(50))
    (ids,) = Prompt().encode([dialogue], words, max_length)["input_ids"]
    assert len(ids) == max_length
    assert words.decode(ids) == "<s> Dialogue : " + " ".join(f"w{i}" for i in range(max_length - 6)) + " Summary : </s>"


def test_references_are_grouped_and_limited(tmp_path):
    data = load_summaries(files={"test": write(tmp_path / "t.jsonl")})
    groups = group_dialogues(data["test"])
    assert [(group.id, group.references) for group in groups] == [
        ("test_0", ["they greet", "a greeting"]),
        ("test_1", ["they part", "a farewell"]),
    ]
    assert len(group_dialogues(data["test"], 1)) == 1


def test_other_columns_and_no_ids(tmp_path):
    rows = [{"text": "hello there", "tldr": "they greet"}, {"text": "hello there", "tldr": "hi"}]
    data = load_summaries(files={"train": write(tmp_path / "t.jsonl", rows)}, text_column="text", summary_column="tldr")
    assert [group.references for group in group_dialogues(data["train"])] == [["they greet"], ["hi"]]


def test_bad_input(tmp_path, words):
    path = write(tmp_path / "t.jsonl")
    with pytest.raises(BlobError, match=r"no column 'text', only id, dialogue, summary; set --text_column"):
        load_summaries(files={"train": path}, text_column="text")
    with pytest.raises(BlobError, match="no column 'highlights'.*--summary_column"):
        load_summaries(files={"train": path}, summary_column="highlights")
    empty = write(tmp_path / "n.jsonl", [{"dialogue": "x", "summary": None}, {"dialogue": "x", "summary": "y"}])
    with pytest.raises(BlobError, match="row 0 of train has no dialogue or no summary"):
        load_summaries(files={"train": empty})
    unequal = load_summaries(files={"test": write(tmp_path / "u.jsonl", ROWS[:3])})
    with pytest.raises(BlobError, match="dialogue test_1_1 has 1 references, but test_0 has 2"):
        group_dialogues(unequal["test"])
    with pytest.raises(BlobError, match="nothing to train on"):
        load_summaries()
    with pytest.raises(BlobError, match=r"must contain \{dialogue\} exactly once"):
        Prompt("Summarize:")
    with pytest.raises(BlobError, match="leaves no room"):
        Prompt(DEFAULT_PROMPT).encode(["hello"], words, 4)
    with pytest.raises(BlobError, match=r"cannot get the dataset 'knkarthick/dialogsum'.*--demo"):
        load_summaries("knkarthick/dialogsum")


def test_references_of_one_dialogue_are_gathered_in_order():
    ids = ["test_0_1", "test_0_2", "test_1_1", "test_1_2"]
    groups = group_references(ids, ["A", "A", "B", "B"], ["a1", "a2", "b1", "b2"])
    assert groups == [("test_0", "A", ["a1", "a2"]), ("test_1", "B", ["b1", "b2"])]


def test_rows_with_plain_ids_stay_on_their_own():
    groups = group_references(["train_0", "train_1", "7"], ["A", "A", "A"], ["x", "y", "z"])
    assert groups == [("train_0", "A", ["x"]), ("train_1", "A", ["y"]), ("7", "A", ["z"])]
    assert group_references(["5", "5"], ["A", "A"], ["x", "y"]) == [("5", "A", ["x", "y"])]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_references(["a"], ["A"], []), "1 ids, 1 dialogues and 0 summaries"),
        (
            lambda: group_references(["t_0_1", "t_0_2", "t_1_1"], ["A", "A", "B"], ["x", "y", "z"]),
            "dialogue t_1_1 has 1 references, but t_0 has 2",
        ),
    ],
)
def test_columns_and_references_that_do_not_fit_together(call, message):
    with pytest.raises(BlobError, match=message):
        call()


def test_a_test_split_may_come_without_summaries(tmp_path):
    def load(name, *values, split="test"):
        rows = [{"dialogue": f"w{i}", **({} if v == "absent" else {"summary": v})} for i, v in enumerate(values)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_summaries(files={split: str(tmp_path / name)})[split]

    for values in (("absent", "absent"), ("", " "), (None, None)):
        found = group_dialogues(load("test.jsonl", *values))
        assert found == [Dialogue("0", "w0", []), Dialogue("1", "w1", [])]
    (tmp_path / "test.csv").write_text("dialogue,summary\nw0,\nw1,\n")  # empty cells
    assert load_summaries(files={"test": str(tmp_path / "test.csv")})["test"]["summary"] == [None, None]
    with pytest.raises(BlobError, match="row 1 of test has no dialogue or no summary"):
        load("test.jsonl", "a", "")
    with pytest.raises(BlobError, match="row 0 of validation has no"):
        load("validation.jsonl", "", "", split="validation")
    with pytest.raises(BlobError, match="the validation split has no column 'summary'"):
        load("validation.jsonl", "absent", split="validation")
