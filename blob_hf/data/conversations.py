"""Prompts of causal models: plain texts, and conversations in the chat template of a tokenizer.

Of a row's columns the first of these is read, as supervised fine-tuning reads it: `prompt` (a text or messages),
`messages` (or `conversations`, with `from` and `value`), else its text.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from blob_hf.utils.errors import BlobError

Conversation: TypeAlias = list[dict[str, Any]]

ANSWERED = ("messages", "conversations")  # columns whose conversations may end with the answer
_COLUMNS = ("prompt", *ANSWERED)
OF_TEMPLATES = ("tools", "chat_template_kwargs")  # columns that training hands to the template
_SHAREGPT = {"from": "role", "value": "content"}
_MARK = "ANSWER"


def prompt_column(names: Iterable[str]) -> str | None:
    """Which column holds the prompts or conversations; None where none has such a name."""
    found = set(names)
    return next((name for name in _COLUMNS if name in found), None)


def is_conversation(value: object) -> bool:
    """Whether it is a list of messages."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def is_message(value: object) -> bool:
    """Whether it looks like a message, and not like a row."""
    return (
        isinstance(value, Mapping) and prompt_column(value) is None and bool({"role", "from", "content"} & set(value))
    )


def check_columns(row: Mapping[str, Any], where: str) -> None:
    """Refuse a row of which a part would not be read.

    Raises:
        BlobError: It has tools, or settings of the template.
    """
    for name in OF_TEMPLATES:
        if row.get(name):
            raise BlobError(f"{where} has {name}, which are not read; give the token ids of the rendered prompt")


def conversation(value: Sequence[Any], where: str, answered: bool = False) -> Conversation:
    """The messages of a conversation, checked; keys without a value (tables fill them in) are left out.

    Args:
        where: Which one it is, for messages.
        answered: Leave out the assistant's messages at the end: they are what is to be written.

    Raises:
        BlobError: There is no message, or one has no role or no text.
    """
    found: Conversation = []
    for index, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise BlobError(f"message {index} of {where} is not a dict of role and content: {str(message)[:60]!r}")
        own = {_SHAREGPT.get(str(key), str(key)): part for key, part in message.items() if part is not None}
        for key in ("role", "content"):
            if key not in own and not (key == "content" and own.get("tool_calls")):
                raise BlobError(f"message {index} of {where} has no {key}, only {', '.join(own) or 'nothing'}")
            if not isinstance(own.get(key, ""), str):
                raise BlobError(f"the {key} of message {index} of {where} is not a text: {str(own[key])[:60]!r}")
        found.append(own)
    while answered and found and found[-1]["role"] == "assistant":
        found.pop()
    if not found:
        raise BlobError(f"the conversation of {where} is empty" + (" but for the answer" if len(value) else ""))
    return found


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot put messages together.

    Raises:
        BlobError: It has no chat template.
    """
    if not tokenizer.chat_template:
        raise BlobError(
            "the prompts are conversations, but the tokenizer has no chat template; give texts, or set "
            "tokenizer.chat_template"
        )


def encode_conversation(messages: Conversation, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins.

    Raises:
        BlobError: The tokenizer's template refuses it.
    """
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise BlobError(f"the tokenizer's chat template refuses the conversation of {where}: {error}") from error
    return list(encoded["input_ids"])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token by which the chat template ends an answer; None where there is none."""
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}], tokenize=False
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return None
    behind = str(rendered).rpartition(_MARK)[2].lstrip()
    tokens = tokenizer(behind, add_special_tokens=False).input_ids if behind else []
    return int(tokens[0]) if tokens and tokens[0] in tokenizer.added_tokens_decoder else None
