"""What a row is read from: one text or two, or for causal models a conversation; and its token ids."""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from blob_hf.data.columns import find_text_columns
from blob_hf.data.conversations import (
    ANSWERED,
    OF_TEMPLATES,
    Conversation,
    check_columns,
    conversation,
    encode_conversation,
    is_conversation,
    is_message,
    prompt_column,
    require_template,
)
from blob_hf.data.summarization import Prompt
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

# A text, texts, pairs of texts; for causal models messages, lists of them, or rows with them; token ids by the model's
# names; a dataset of any of these.
Inputs: TypeAlias = str | Sequence[Any] | Mapping[str, Any] | Dataset
Text: TypeAlias = tuple[str, ...] | Conversation

LABELS = ("label", "labels", "label_ids")
_TOKENIZING = threading.Lock()  # truncating is a setting of a fast tokenizer, which one thread changes at a time


def texts_of(inputs: Inputs, columns: Sequence[str] | None = None) -> list[tuple[str, ...]]:
    """One or two texts of each row.

    Raises:
        BlobError: It holds something else.
    """
    rows: list[Any]
    if isinstance(inputs, Dataset):
        columns = columns or find_text_columns(inputs, LABELS)
        missing = [name for name in columns if name not in inputs.column_names]
        if missing:
            raise BlobError(f"the dataset has no column {missing[0]!r}, only {', '.join(inputs.column_names)}")
        rows = list(zip(*(inputs[name] for name in columns), strict=True))
    elif isinstance(inputs, Mapping):
        raise BlobError(f"a tokenized batch has input_ids; this one has {', '.join(map(str, inputs)) or 'nothing'}")
    else:
        try:
            rows = [inputs] if isinstance(inputs, str) else list(inputs)
        except TypeError:
            raise BlobError(f"give texts, pairs, a tokenized batch or a dataset, not {type(inputs).__name__}") from None
        rows = [(row,) if isinstance(row, str) else row for row in rows]
    for index, row in enumerate(rows):
        if not isinstance(row, (tuple, list)) or not all(isinstance(text, str) for text in row):
            raise BlobError(f"row {index} is not a text or a pair of texts: {str(row)[:60]!r}")
        if not 1 <= len(row) <= 2 or len(row) != len(rows[0]):
            raise BlobError(f"row {index} has {len(row)} texts, the first one {len(rows[0])}; give one or two in each")
    return [tuple(row) for row in rows]


def prompts_of(inputs: Inputs, columns: Sequence[str] | None = None) -> list[Text]:
    """What each row of a causal model goes on from: texts, conversations, or rows with them in a column.

    (Which column: see `blob_hf.data.conversations`.)

    Raises:
        BlobError: It holds something else.
    """
    if isinstance(inputs, Dataset):
        column = (
            columns[0] if columns and len(columns) == 1 else None if columns else prompt_column(inputs.column_names)
        )
        if column is None or column not in inputs.column_names:
            return list(texts_of(inputs, columns))
        inputs = inputs.select_columns([name for name in inputs.column_names if name in (column, *OF_TEMPLATES)])
        return [_prompt(row[column], row, column, f"row {index}") for index, row in enumerate(inputs)]
    if isinstance(inputs, Mapping) or is_message(inputs[0] if isinstance(inputs, (list, tuple)) and inputs else None):
        inputs = [inputs]  # one row, one conversation
    listed = list(inputs) if isinstance(inputs, (list, tuple)) else []
    if not any(isinstance(row, Mapping) or _holds_messages(row) for row in listed):
        return list(texts_of(inputs))
    return [_row(row, index) for index, row in enumerate(listed)]


def _holds_messages(row: Any) -> bool:
    return is_conversation(row) or (isinstance(row, (list, tuple)) and not row)


def _row(row: Any, index: int) -> Text:
    where = f"row {index}"
    if not isinstance(row, Mapping):
        return _prompt(row, {}, None, where)
    column = prompt_column(row) or ("text" if "text" in row else None)
    if column is None:
        raise BlobError(
            f"{where} has no prompt, messages or text, only {', '.join(map(str, row)) or 'nothing'} (a tokenized batch "
            "has input_ids)"
        )
    return _prompt(row[column], row, column, where)


def _prompt(value: Any, row: Mapping[str, Any], column: str | None, where: str) -> Text:
    check_columns(row, where)
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, (list, tuple)):
        named = f"the {column} of {where}" if column else where
        raise BlobError(f"{named} is neither a text nor a list of messages: {str(value)[:60]!r}")
    return conversation(value, where, answered=column in ANSWERED)


def question(text: Text) -> str:
    """What a row asks: the last message of a user; of texts these."""
    if isinstance(text, tuple):
        return "\n".join(text)
    return next((str(one.get("content", "")) for one in reversed(text) if one["role"] == "user"), "")


def encode(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, prompt: str | None, limit: int, goes_on: bool
) -> Mapping[str, Any]:
    """Token ids of each row, at most `limit`.

    Args:
        prompt: With {dialogue} in the place of a row's text.
        goes_on: Whether the model goes on from the end of a row, which therefore loses its beginning if it is too long.

    Raises:
        BlobError: Something that a prompt has no room for, or that the tokenizer cannot render.
    """
    if not texts:
        return {}
    if prompt is not None:
        if not all(isinstance(text, tuple) and len(text) == 1 for text in texts):
            raise BlobError("a prompt has room for one text, but the rows are pairs or conversations")
        with _TOKENIZING:
            return Prompt(prompt).encode([text[0] for text in texts if isinstance(text, tuple)], tokenizer, limit)
    with _TOKENIZING:
        if not goes_on:
            return tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=limit)
        return _end_kept(texts, tokenizer, limit)


def _end_kept(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, limit: int) -> Mapping[str, Any]:
    if any(is_conversation(text) for text in texts):
        require_template(tokenizer)
    rows: list[list[int]] = [
        tokenizer(*text).input_ids if isinstance(text, tuple) else encode_conversation(text, tokenizer, f"row {index}")
        for index, text in enumerate(texts)
    ]
    if empty := [index for index, row in enumerate(rows) if not row]:
        raise BlobError(f"row {empty[0]} has no text to go on from")
    if cut := sum(len(row) > limit for row in rows):
        logger.warning("%d of %d prompts are longer than %d tokens and lose their beginning", cut, len(rows), limit)
    rows = [row[-limit:] for row in rows]
    return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
