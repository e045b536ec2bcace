"""What supervised fine-tuning needs of its rows and of the tokenizer, said before TRL stumbles over it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from blob_hf.data.conversations import ANSWERED, is_conversation, prompt_column
from blob_hf.utils.errors import BlobError

_JINJA = (".jinja", ".j2")


def first_row(rows: Any) -> Mapping[str, Any]:
    """The row that shows in which form all are.

    Raises:
        BlobError: There is none.
    """
    row = next(iter(rows), None)
    if row is None:
        raise BlobError("the data set to fine-tune on is empty")
    return row


def has_messages(row: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation: a list of messages, or a prompt and a completion of messages."""
    column = prompt_column(row)
    return column is not None and is_conversation(row[column])


def check_rows(row: Mapping[str, Any], text_field: str, formatted: bool, where: str) -> None:
    """Refuse rows in a form that TRL does not know.

    Args:
        text_field: Column of plain texts.
        formatted: Whether a function of the user's makes texts of the rows.
        where: What the rows are for, for messages.

    Raises:
        BlobError: They are.
    """
    if "image" in row or "images" in row:
        raise BlobError("BlobSFTTrainer trains on texts, but the rows have images; leave that column out")
    known = {"input_ids", "messages", "conversations", text_field} & set(row) or {"prompt", "completion"} <= set(row)
    if not (known or formatted):
        raise BlobError(
            f"{where}: rows need the columns prompt and completion, messages, or {text_field}; these have "
            f"{', '.join(row)}"
        )


def check_set(rows: Any, text_field: str, where: str, formatted: bool = False) -> None:
    """Refuse rows that TRL cannot read; of a stream the first alone is looked at.

    Args:
        rows: A data set; None passes.
        text_field, where, formatted: As of `check_rows`.

    Raises:
        BlobError: naming the first such row.
    """
    if rows is None:
        return
    check_rows(first_row(rows), text_field, formatted, where)
    if isinstance(rows, Dataset) and not formatted:
        check_cells(rows, text_field, where)


def check_cells(rows: Dataset, text_field: str, where: str) -> None:
    """Refuse a row without the text or the messages that its columns promise.

    Args:
        text_field: Column of plain texts.
        where: What the rows are for, for messages.

    Raises:
        BlobError: naming the row, the first of which is row 1.
    """
    columns = set(rows.column_names)
    if "input_ids" in columns:
        return
    if {"prompt", "completion"} <= columns:
        read = ["prompt", "completion"]
    else:
        read = [name for name in (*ANSWERED, text_field) if name in columns][:1]
    for number, row in enumerate(rows.select_columns(read), start=1):
        for name in read:
            if fault := _fault(row[name], may_be_text=name not in ANSWERED, may_be_empty=name != text_field):
                raise BlobError(f"{where}, row {number}: {name} {fault}")


def _fault(value: object, may_be_text: bool, may_be_empty: bool) -> str | None:
    """What is wrong with a text or a conversation; None for one that can be trained on."""
    if isinstance(value, str) and may_be_text:
        return None if value or may_be_empty else "is empty; leave such rows out"
    if value is None:
        return "is missing; leave such rows out"
    if not is_conversation(value):
        forms = "a text or a list of messages" if may_be_text else "a list of messages"
        return f"must be {forms}, got {str(value)[:60]!r}"
    for index, message in enumerate(cast(Sequence[object], value)):
        given = {name for name, part in message.items() if part is not None} if isinstance(message, Mapping) else set()
        for key, other in (("role", "from"), ("content", "value")):
            if not {key, other} & given and not (key == "content" and given - {"role", "from"}):
                return f"has no {key} in message {index}"
    return None


def check_tokenizer(tokenizer: object, row: Mapping[str, Any], template: str | None) -> None:
    """Refuse a tokenizer without what the rows need: a chat template, an end token, something to pad with.

    Args:
        template: `chat_template_path`.

    Raises:
        BlobError: It lacks that.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise BlobError(f"BlobSFTTrainer needs a tokenizer, got a {type(tokenizer).__name__}")
    if template is not None and not (template.endswith(_JINJA) and Path(template).is_file()):
        raise BlobError(
            f"chat_template_path must be a Jinja file ({' or '.join(_JINJA)}) that exists, got {template}: the "
            "template of another tokenizer may need tokens that the model does not have"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise BlobError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token and save it")
    if "input_ids" in row:
        return
    if has_messages(row):
        if not tokenizer.chat_template and template is None:
            raise BlobError(
                "the rows are messages, but the tokenizer has no chat template; give chat_template_path (a Jinja file)"
            )
    elif tokenizer.eos_token is None:
        raise BlobError("the tokenizer has no end token, which a text is closed with; set eos_token")
