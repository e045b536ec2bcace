"""The rows of `blob distil`: read as `blob predict` reads them, tokenized for teacher and student alike."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from blob_hf.cli.question_files import questions_of
from blob_hf.cli.row_files import LABELS
from blob_hf.data.columns import check_texts, chosen_columns, find_text_columns
from blob_hf.data.conversations import ANSWERED, check_columns, conversation, is_conversation, prompt_column
from blob_hf.data.labels import encode, read_names
from blob_hf.data.loading import load_files, require_columns
from blob_hf.data.summarization import DEFAULT_PROMPT
from blob_hf.distillation import ClassRows, Context, Layout, TextRows
from blob_hf.inference.choices import ChoiceScoring, choice_rows, padding_token
from blob_hf.inference.inputs import find_tokenizer, longest_input, rows_of
from blob_hf.inference.stopping import end_tokens
from blob_hf.tuner.base_model import is_sequence_classifier
from blob_hf.tuner.model import BlobModel
from blob_hf.utils.errors import BlobError

ANSWERS = ("auto", "data", "teacher", "text")
_CONVERSATION, _PAIR = "messages", ("prompt", "completion")
_SUMMARIES = ("dialogue", "summary")  # of the summarization script


@dataclass(frozen=True)
class Given:
    """The rows of files, and their labels if they were asked for.

    Attributes:
        answers: Along which texts a model that writes is taught: of the `data`, of the `teacher`, or each `text`
            itself; "" of classes.
    """

    rows: ClassRows | TextRows
    answers: str = ""
    labels: NDArray[np.int64] | None = None


def read_rows(model: BlobModel, args: argparse.Namespace, paths: Sequence[str], split: str, labelled: bool) -> Given:
    """The rows of files that all have the same columns.

    Args:
        split: What they are, for messages: data or eval_data.
        labelled: Whether labels (of texts: answers) are needed; else they are ignored (of texts: taken if there).

    Raises:
        BlobError: A file cannot be read, has other columns than the task's, or a label is missing or unknown.
    """
    files = [load_files({split: path}, args.delimiter)[split] for path in paths]
    if isinstance(scoring := model.companion(ChoiceScoring.slot), ChoiceScoring):
        return _of_choices(model, scoring, args, files, paths, labelled)
    if is_sequence_classifier(model.get_base_model()):
        return _of_classes(model, args, files, split, labelled)
    return _of_texts(model, args, files, split, labelled)


# ----- classes ---------------------------------------------------------------------------------------------------


def _of_classes(
    model: BlobModel, args: argparse.Namespace, files: Sequence[Dataset], split: str, labelled: bool
) -> Given:
    columns = chosen_columns(files[0], args.text_columns, (*LABELS, args.label_column))
    texts = _texts(files, columns, split)
    rows = ClassRows(texts, rows_of(model, texts, find_tokenizer(model), max_length=args.max_length), args.max_length)
    if not labelled:
        return Given(rows)
    config: Any = model.get_base_model().config
    classes = [str(config.id2label[index]) for index in range(config.num_labels)]
    ids: list[int] = []
    for file in files:
        require_columns(DatasetDict({split: file}), [args.label_column], "--label_column")
        names = read_names(file, args.label_column, split)
        if None in names:
            raise BlobError(f"row {names.index(None)} of {split} has no label in column {args.label_column!r}")
        ids += encode(names, classes, split, file.features[args.label_column])
    return Given(rows, labels=np.array(ids))


def _texts(files: Sequence[Dataset], columns: Sequence[str], split: str) -> list[tuple[str, ...]]:
    for file in files:
        check_texts(DatasetDict({split: file}), columns)
    return [row for file in files for row in zip(*(file[name] for name in columns), strict=True)]


def _of_choices(
    model: BlobModel, scoring: ChoiceScoring, args: argparse.Namespace, files: Sequence[Dataset],
    paths: Sequence[str], labelled: bool,
) -> Given:  # fmt: skip
    asked: list[dict[str, Any]] = []
    for file, path in zip(files, paths, strict=True):
        asked += questions_of(file, path, labelled).to_list()
    labels = [row.pop("label", None) for row in asked]
    if labelled and None in labels:
        raise BlobError(f"question {labels.index(None) + 1} of {paths[0]} has no label")
    tokenized = choice_rows(asked, scoring, find_tokenizer(model), args.max_length)
    rows = ClassRows(asked, tokenized, args.max_length)
    return Given(rows, labels=np.array(labels) if labelled else None)


# ----- texts -----------------------------------------------------------------------------------------------------


def _of_texts(
    model: BlobModel, args: argparse.Namespace, files: Sequence[Dataset], split: str, labelled: bool
) -> Given:
    tokenizer = find_tokenizer(model)
    base: Any = model.get_base_model()
    contexts: list[Context] = []
    files = [_named_messages(file) for file in files]
    for file in files:  # some may have answers, others not
        wanted = "auto" if labelled and args.answers == "teacher" else args.answers  # measured by the data's
        answers, target = _answers(args, file, bool(base.config.is_encoder_decoder), wanted)
        if labelled and answers == "teacher":
            raise BlobError(
                f"--eval_data needs answers to measure by ({target}), but its columns are "
                f"{', '.join(file.column_names)}; set --target_column"
            )
        if base.config.is_encoder_decoder:
            contexts += _summarized(model, args, file, split, tokenizer, target if answers == "data" else None)
        elif answers == "data":
            open_ended = not labelled and args.answers == "auto"
            contexts += _conversations(model, args, file, split, tokenizer, target, open_ended)
        elif answers == "text":
            contexts += _themselves(model, args, file, split, tokenizer)
        else:
            contexts += _prompted(model, args, file, split, tokenizer)
    layout = Layout.of(model, padding_token(tokenizer))
    given = "text" if args.answers == "text" else "data"
    kinds = {given if one.target is not None else "teacher" for one in contexts}
    of_turns = any(map(_has_conversations, files))
    ends = () if base.config.is_encoder_decoder else tuple(end_tokens(model, tokenizer, of_turns))
    return Given(TextRows(contexts, layout, args.top_k, args.max_new_tokens, ends), " and ".join(sorted(kinds)))


def _named_messages(file: Dataset) -> Dataset:
    """A file whose conversations, by whatever name `data.conversations` knows, are the column `messages`."""
    name = next((name for name in ANSWERED if name in file.column_names), _CONVERSATION)
    return file if name == _CONVERSATION else file.rename_column(name, _CONVERSATION)


def _has_conversations(file: Dataset) -> bool:
    column = prompt_column(file.column_names)
    return column is not None and len(file) > 0 and is_conversation(file[0][column])


def _answers(args: argparse.Namespace, file: Dataset, encodes: bool, wanted: str) -> tuple[str, str]:
    """Which answers, and the column of those of the data."""
    names = file.column_names
    usual = _SUMMARIES[1] if encodes else (_CONVERSATION if _CONVERSATION in names else _PAIR[1])
    target = args.target_column or usual
    there = target in names and (encodes or target == _CONVERSATION or _PAIR[0] in names or bool(args.text_columns))
    if (wanted == "data" and not there) or (args.target_column and target not in names):
        raise BlobError(f"there is no column of answers {target!r}, only {', '.join(names)}; set --target_column")
    if wanted == "text" and encodes:
        raise BlobError("--answers text is for causal models, which read and write one text; choose data or teacher")
    return (("data" if there else "teacher") if wanted == "auto" else wanted), target


def _limit(model: BlobModel, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> int:
    return args.max_length or longest_input(model, tokenizer)


def _column(file: Dataset, name: str, split: str) -> list[str]:
    check_texts(DatasetDict({split: file}), [name])
    return list(file[name])


def _text_columns(args: argparse.Namespace, file: Dataset, usual: str, target: str | None) -> list[str]:
    if args.text_columns:
        columns = list(args.text_columns)
    elif usual in file.column_names:
        columns = [usual]
    else:
        columns = list(find_text_columns(file, (*LABELS, *([target] if target else []))))
    if len(columns) != 1:
        raise BlobError(f"a model that writes reads one column of texts, got {', '.join(columns)}; set --text_columns")
    return columns


def _summarized(
    model: BlobModel, args: argparse.Namespace, file: Dataset, split: str, tokenizer: Any, target: str | None
) -> list[Context]:
    (column,) = _text_columns(args, file, _SUMMARIES[0], target)
    texts = _column(file, column, split)
    ids = rows_of(model, texts, tokenizer, None, args.prompt or DEFAULT_PROMPT, args.max_length).columns["input_ids"]
    if target is None:
        return [Context(row.tolist()) for row in ids]
    found = tokenizer(text_target=_column(file, target, split), max_length=args.max_new_tokens, truncation=True)
    return [Context(row.tolist(), list(own)) for row, own in zip(ids, found.input_ids, strict=True)]


def _prompted(model: BlobModel, args: argparse.Namespace, file: Dataset, split: str, tokenizer: Any) -> list[Context]:
    """Texts that the teacher answers: prompts as `blob predict` reads them, or conversations without a last answer."""
    room = args.max_new_tokens
    if not args.text_columns and _has_conversations(file):
        column = prompt_column(file.column_names)
        for number, row in enumerate(file):
            check_columns(row, f"row {number} of {split}")
        conversations = [_messages(value, number, split) for number, value in enumerate(file[column])]
        asked = [_up_to_the_answer(messages, number, split) for number, messages in enumerate(conversations)]
        return [_question(model, args, tokenizer, one) for one in asked]
    (column,) = _text_columns(args, file, _PAIR[0], None)
    texts = _column(file, column, split)
    ids = rows_of(model, texts, tokenizer, None, args.prompt, args.max_length, room).columns["input_ids"]
    return [Context(row.tolist()) for row in ids]


def _messages(value: Any, number: int, split: str) -> list[dict[str, Any]]:
    return conversation(value if isinstance(value, list) else [value], f"row {number} of {split}")


def _question(
    model: BlobModel, args: argparse.Namespace, tokenizer: Any, messages: Sequence[Mapping[str, Any]]
) -> Context:
    """A conversation that the teacher answers; what is too long loses its beginning."""
    limit = _limit(model, args, tokenizer) - (0 if args.max_length else args.max_new_tokens)
    if limit < 1:
        raise BlobError(f"{args.max_new_tokens} new tokens leave no room for a text: the model takes "
                        f"{limit + args.max_new_tokens}")  # fmt: skip
    return Context(_templated(tokenizer, messages, True)[-limit:])


def _conversations(
    model: BlobModel, args: argparse.Namespace, file: Dataset, split: str, tokenizer: Any, target: str,
    open_ended: bool,
) -> list[Context]:  # fmt: skip
    """Prompts and their completions, or conversations and their last answer, tokenized as TRL does for training."""
    limit, found = _limit(model, args, tokenizer), []
    for number, row in enumerate(file):
        check_columns(row, f"row {number} of {split}")
        if target == _CONVERSATION:
            messages = _messages(row[_CONVERSATION], number, split)
            asked = _up_to_the_answer(messages, number, split)
            if len(asked) == len(messages):  # it ends with a question
                if not open_ended:
                    raise BlobError(f"row {number} of {split} has no answer")
                found.append(_question(model, args, tokenizer, asked))
                continue
            pair: tuple[Any, Any] = (asked, messages)
        else:
            prompt = row[args.text_columns[0] if args.text_columns else _PAIR[0]]
            pair = (prompt, _joined(prompt, row[target], number, split))
        context, whole = (_tokens(tokenizer, one, first) for one, first in zip(pair, (True, False), strict=True))
        if not isinstance(pair[0], str) and whole[: len(context)] != context:
            raise BlobError(
                f"row {number} of {split}: the chat template begins an answer with what it leaves out of a whole "
                "conversation, so the answer's tokens cannot be told; give prompts alone, and the teacher answers"
            )
        answer = whole[len(context) :][: args.max_new_tokens]
        if not answer:
            raise BlobError(f"row {number} of {split} has no answer")
        if len(answer) >= limit:
            raise BlobError(f"the answer of row {number} of {split} alone has {len(answer)} of {limit} tokens")
        found.append(Context(context[-(limit - len(answer)) :], answer))  # what is too long loses its beginning
    return found


def _joined(prompt: Any, completion: Any, number: int, split: str) -> Any:
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, list) and isinstance(completion, list):
        return [*prompt, *completion]
    raise BlobError(f"row {number} of {split}: prompt and completion must both be texts, or both lists of messages")


def _up_to_the_answer(messages: Sequence[Mapping[str, Any]], number: int, split: str) -> list[Mapping[str, Any]]:
    """A conversation without the assistant's last message, if it ends with one."""
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not asked:
        raise BlobError(f"row {number} of {split} has an answer, but no question")
    return list(asked)


def _tokens(tokenizer: Any, content: Any, is_prompt: bool) -> list[int]:
    if not isinstance(content, str):
        return _templated(tokenizer, content, is_prompt)
    ids = list(tokenizer(content).input_ids)
    if ids and ids[-1] == tokenizer.eos_token_id:  # of tokenizers that close every text
        ids = ids[:-1]
    return ids if is_prompt else [*ids, tokenizer.eos_token_id]


def _templated(tokenizer: Any, messages: Sequence[Mapping[str, Any]], is_prompt: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise BlobError("the rows are messages, but the adapter's tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=is_prompt)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise BlobError(f"the chat template refuses a conversation: {error}") from error
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _themselves(model: BlobModel, args: argparse.Namespace, file: Dataset, split: str, tokenizer: Any) -> list[Context]:
    """Every token of a text but the first, as language modelling trains them."""
    (column,) = _text_columns(args, file, "text", None)
    limit, found = _limit(model, args, tokenizer), []
    for number, text in enumerate(_column(file, column, split)):
        ids = _tokens(tokenizer, text, False)[:limit]
        if len(ids) < 2:
            raise BlobError(f"row {number} of {split} has fewer than two tokens")
        found.append(Context(ids[:1], ids[1:]))
    return found
