"""What `blob distil` reads for models that write: contexts and answers of every form, against tokens by hand."""

import json

import pytest
import torch
from helpers.adapters import one_line
from helpers.models import TARGETS, tiny_bart, tiny_gpt2, tiny_tokenizer

from blob_hf import BlobConfig, get_blob_model
from blob_hf.cli.distil import parser
from blob_hf.cli.distil_rows import read_rows

END = 2
TEMPLATE = (
    "{% for m in messages %}{{ 'w50' if m.role == 'user' else 'w51' }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w51 {% endif %}"
)


@pytest.fixture(scope="module")
def writers():
    found = {}
    for family, base in (("gpt2", tiny_gpt2()), ("bart", tiny_bart())):
        torch.manual_seed(0)
        model = get_blob_model(base, BlobConfig(target_modules=TARGETS[family], r=2)).eval()
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE
        model.tokenizers["default"] = tokenizer
        found[family] = model
    return found


def read(model, folder, rows, *options, labelled=False):
    paths = []
    for number, some in enumerate(rows if isinstance(rows[0], list) else [rows]):
        paths.append(str(folder / f"rows{number}.jsonl"))
        (folder / f"rows{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    args = parser().parse_args(["x", "--data", *paths, "--output", "o", *map(str, options)])
    given = read_rows(model, args, paths, "data", labelled)
    return given.answers, [(one.tokens, one.target) for one in given.rows.contexts]


def turn(role, content):
    return {"role": role, "content": content}


def test_causal_rows(writers, tmp_path):
    model = writers["gpt2"]
    pairs = [{"prompt": "w4 w5", "completion": " w6"}, {"prompt": "w7", "completion": " w8 w9"}]
    expected = [([4, 5], [6, END]), ([7], [8, 9, END])]
    assert read(model, tmp_path, pairs) == ("data", expected)
    assert read(model, tmp_path, pairs, "--max_new_tokens", 2)[1][1] == ([7], [8, 9])
    # too long for the model: the context loses its beginning, the answer nothing
    assert read(model, tmp_path, pairs, "--max_length", 4)[1] == [([4, 5], [6, END]), ([7], [8, 9, END])]
    assert read(model, tmp_path, pairs[:1], "--max_length", 3)[1] == [([5], [6, END])]
    one_line("answer of row 1 of data alone has 3 of 3", lambda: read(model, tmp_path, pairs, "--max_length", 3))
    own = [{"q": "w4 w5", "a": " w6"}]
    options = ["--text_columns", "q", "--target_column", "a"]
    assert read(model, tmp_path, own, *options) == ("data", expected[:1])
    one_line("no column of answers 'b', only q, a", lambda: read(model, tmp_path, own, "--target_column", "b"))
    # conversations: the last answer, after the template's opening of it
    chat = [{"messages": [turn("user", "w4"), turn("assistant", "w5"), turn("user", "w6"), turn("assistant", "w7 w8")]}]
    assert read(model, tmp_path, chat) == ("data", [([50, 4, 51, 5, 50, 6, 51], [7, 8])])
    few = ["--max_new_tokens", 8]
    assert read(model, tmp_path, chat, "--answers", "teacher", *few)[1] == [([50, 4, 51, 5, 50, 6, 51], None)]
    one_line("128 new tokens leave no room", lambda: read(model, tmp_path, chat, "--answers", "teacher"))
    asked = [{"messages": chat[0]["messages"][:3]}]
    both = [([50, 4, 51, 5, 50, 6, 51], [7, 8]), ([50, 4, 51, 5, 50, 6, 51], None)]
    assert read(model, tmp_path, [chat, asked], *few) == ("data and teacher", both)
    one_line("row 0 of data has no answer", lambda: read(model, tmp_path, asked, labelled=True))
    messages = [{"prompt": [turn("user", "w4")], "completion": [turn("assistant", "w5")]}]
    assert read(model, tmp_path, messages) == ("data", [([50, 4, 51], [5])])
    one_line("has an answer, but no question", lambda: read(model, tmp_path, [{"messages": [turn("assistant", "w4")]}]))
    mixed = [{"prompt": "w4", "completion": [turn("assistant", "w5")]}]
    one_line("must both be texts", lambda: read(model, tmp_path, mixed))
    # texts: prompts that the teacher answers, as `predict` reads them, or taught along themselves
    texts = [{"text": "w4 w5 w6"}]
    assert read(model, tmp_path, texts, *few) == ("teacher", [([4, 5, 6, END], None)])
    assert read(model, tmp_path, texts, "--answers", "text") == ("text", [([4], [5, 6, END])])
    one_line("--eval_data needs answers", lambda: read(model, tmp_path, texts, labelled=True))
    one_line("several columns could be", lambda: read(model, tmp_path, [{"a": "w4", "b": "w5"}]))


def test_rows_of_a_summarizer(writers, tmp_path):
    model, prompt = writers["bart"], ["--prompt", "a {dialogue}"]
    rows = [{"dialogue": "w4 w5", "summary": "w6"}]
    assert read(model, tmp_path, rows, *prompt) == ("data", [([59, 4, 5, END], [6, END])])
    assert read(model, tmp_path, rows, *prompt, "--answers", "teacher") == ("teacher", [([59, 4, 5, END], None)])
    measured = read(model, tmp_path, rows, *prompt, "--answers", "teacher", labelled=True)
    assert measured == ("data", [([59, 4, 5, END], [6, END])])  # whatever it is taught along
    bare = [{"text": "w4 w5"}]
    assert read(model, tmp_path, bare, *prompt) == ("teacher", [([59, 4, 5, END], None)])
    both = [([59, 4, 5, END], [6, END]), ([59, 4, 5, END], None)]
    assert read(model, tmp_path, [rows, bare], *prompt) == ("data and teacher", both)
    one_line("no column of answers 'summary'", lambda: read(model, tmp_path, bare, "--answers", "data"))
    one_line("--answers text is for causal", lambda: read(model, tmp_path, rows, "--answers", "text"))


def test_conversations_are_read_and_checked_as_predict_does(writers, tmp_path):
    model, few = writers["gpt2"], ["--max_new_tokens", 8]
    chat = [turn("user", "w4"), turn("assistant", "w5")]
    asked, answered = ([50, 4, 51], None), ([50, 4, 51], [5])
    shared = [{"conversations": [{"from": "user", "value": "w4"}, {"from": "assistant", "value": "w5"}]}]
    assert read(model, tmp_path, shared, *few) == ("data", [answered])
    assert read(model, tmp_path, [{"prompt": chat[:1]}], *few) == ("teacher", [asked])
    tools = [{"messages": chat, "tools": "search"}]
    for options in (few, [*few, "--answers", "teacher"]):
        one_line("row 0 of data has tools, which are not read", lambda o=options: read(model, tmp_path, tools, *o))
    empty = [{"messages": [{"role": "user"}, chat[1]]}]
    one_line("message 0 of row 0 of data has no content", lambda: read(model, tmp_path, empty, *few))


def test_a_template_that_refuses_or_hides_the_answer_is_one_line(writers, tmp_path):
    model, few = writers["gpt2"], ["--max_new_tokens", 8]
    tokenizer, chat = model.tokenizers["default"], [{"messages": [turn("user", "w4"), turn("assistant", "w5")]}]
    try:
        tokenizer.chat_template = "{{ raise_exception('never') }}"
        one_line("the chat template refuses a conversation: never", lambda: read(model, tmp_path, chat, *few))
        tokenizer.chat_template = TEMPLATE.replace("w51 {% endif %}", "w51 w52 {% endif %}")
        one_line("the answer's tokens cannot be told", lambda: read(model, tmp_path, chat, *few))
    finally:
        tokenizer.chat_template = TEMPLATE


def test_the_teachers_own_answers_end_where_predict_ends_them(writers, tmp_path):
    paths = [tmp_path / "rows.jsonl"]
    paths[0].write_text(json.dumps({"messages": [turn("user", "w4")]}) + "\n")
    args = parser().parse_args(["x", "--data", str(paths[0]), "--output", "o", "--max_new_tokens", "8"])
    rows = read_rows(writers["gpt2"], args, [str(paths[0])], "data", False).rows
    assert {END, writers["gpt2"].generation_config.eos_token_id} <= set(rows.ends)
