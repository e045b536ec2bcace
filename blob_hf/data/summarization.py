"""Dialogues and their summaries: one prompt for training, scoring and generation; references grouped by dialogue."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from blob_hf.data.loading import check_limit, load_files, load_hub, require_columns
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

DEFAULT_PROMPT = "Dialogue:\n{dialogue}\n\nSummary:"
_TEXT, _SUMMARY, _ID = "dialogue", "summary", "id"


@dataclass(frozen=True)
class Prompt:
    """The text a model reads for a dialogue; when too long it is the dialogue that is cut, never the rest."""

    template: str = DEFAULT_PROMPT

    def __post_init__(self) -> None:
        if self.template.count("{dialogue}") != 1:
            raise BlobError(f"--prompt must contain {{dialogue}} exactly once, got {self.template!r}")

    def encode(
        self, dialogues: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, list[list[int]]]:
        """Token ids and attention masks of the prompts, at most max_length long."""
        before, after = self.template.split("{dialogue}")
        # count the tokens after the dialogue (with the closing special tokens, without the opening ones)
        special = set(tokenizer.all_special_ids)
        opening = next(i for i, token in enumerate(tokenizer("a").input_ids) if token not in special)
        kept = len(tokenizer(after).input_ids) - opening
        if kept + opening >= max_length:
            raise BlobError(f"max_source_length {max_length} leaves no room for a dialogue in the prompt")
        ids = tokenizer([before + dialogue + after for dialogue in dialogues]).input_ids
        cut = sum(len(row) > max_length for row in ids)
        if cut:
            logger.warning("%d of %d dialogues are longer than %d tokens and were cut", cut, len(ids), max_length)
        ids = [row if len(row) <= max_length else row[: max_length - kept] + row[len(row) - kept :] for row in ids]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def load_summaries(
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    files: dict[str, str] | None = None,
    text_column: str = _TEXT,
    summary_column: str = _SUMMARY,
    delimiter: str | None = None,
) -> DatasetDict:
    """Splits with the columns id, dialogue and summary.

    The split `test` may come without summaries (no such column, or nothing in it): they are None then.

    Raises:
        BlobError: No data, a missing column, an empty split, a row without text.
    """
    if files:
        data = load_files(files, delimiter)
    elif dataset_name:
        data = load_hub(dataset_name, dataset_config, "--train_file, --validation_file and --test_file")
    else:
        raise BlobError("nothing to train on: give --dataset_name, --train_file, or --demo")
    require_columns(data, [text_column], "--text_column")
    unreferenced = "test" in data and _has_none(data["test"], summary_column)
    referenced = {split: rows for split, rows in data.items() if not (split == "test" and unreferenced)}
    require_columns(DatasetDict(referenced), [summary_column], "--summary_column")
    if unreferenced:
        nothing = Dataset.from_dict({summary_column: [None] * len(data["test"])})
        rest = data["test"].select_columns([name for name in data["test"].column_names if name != summary_column])
        data["test"] = concatenate_datasets([rest, nothing], axis=1)
        logger.info("the test split has no reference summaries: they are written, without ROUGE and NLL")
    return DatasetDict({split: _normalise(rows, split, text_column, summary_column) for split, rows in data.items()})


def _has_none(rows: Dataset, column: str) -> bool:
    """Whether no row has anything in a column, or there is no such column."""
    return column not in rows.column_names or all(_is_blank(value) for value in rows[column])


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value != value  # NaN: an empty cell


def _normalise(rows: Dataset, split: str, text_column: str, summary_column: str) -> Dataset:
    texts, summaries = list(rows[text_column]), list(rows[summary_column])
    referenced = not all(summary is None for summary in summaries)
    pairs = enumerate(zip(texts, summaries, strict=True))
    bad = [
        i
        for i, (text, summary) in pairs
        if not isinstance(text, str) or (referenced and (not isinstance(summary, str) or _is_blank(summary)))
    ]
    if bad:
        raise BlobError(f"row {bad[0]} of {split} has no {text_column} or no {summary_column} ({len(bad)} such rows)")
    ids = [str(value) for value in rows[_ID]] if _ID in rows.column_names else [str(i) for i in range(len(rows))]
    return Dataset.from_dict({_ID: ids, _TEXT: texts, _SUMMARY: summaries})


@dataclass(frozen=True)
class Dialogue:
    """A dialogue with all its reference summaries; none where a test split comes without."""

    id: str
    text: str
    references: list[str]


def single_references(rows: Dataset) -> list[Dialogue]:
    """Every row on its own, as training takes them."""
    columns = (rows[_ID], rows[_TEXT], rows[_SUMMARY])
    return [Dialogue(row_id, text, [summary]) for row_id, text, summary in zip(*columns, strict=True)]


def group_references(
    ids: Sequence[str], dialogues: Sequence[str], summaries: Sequence[str]
) -> list[tuple[str, str, list[str]]]:
    """Gather the references of each dialogue: rows of the same text whose ids are `stem_1`, `stem_2`, ... or equal.

    (DialogSum's test rows are test_0_1, test_0_2, test_0_3, test_1_1, ...)

    Returns:
        (id, dialogue, references) in the order of first appearance; the id is the stem of a gathered dialogue.

    Raises:
        BlobError: Columns of unequal length, or two dialogues with unequal numbers of references.
    """
    if not len(ids) == len(dialogues) == len(summaries):
        raise BlobError(f"got {len(ids)} ids, {len(dialogues)} dialogues and {len(summaries)} summaries; need equal")
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row_id, dialogue, summary in zip(ids, dialogues, summaries, strict=True):
        stem = re.sub(r"_\d+$", "", row_id) if re.search(r"_\d+_\d+$", row_id) else row_id
        groups.setdefault((stem, dialogue), []).append((row_id, summary))
    result = []
    for (stem, dialogue), rows in groups.items():
        result.append((stem if len(rows) > 1 else rows[0][0], dialogue, [summary for _, summary in rows]))
    if result:
        usual = len(result[0][2])
        for name, _, references in result:
            if len(references) != usual:
                raise BlobError(
                    f"dialogue {name} has {len(references)} references, but {result[0][0]} has {usual}; "
                    "every dialogue needs the same number"
                )
    return result


def group_dialogues(rows: Dataset, limit: int | None = None) -> list[Dialogue]:
    """The dialogues of a split in order, the references of one dialogue together; at most `limit` dialogues."""
    check_limit(limit)
    groups = group_references(list(rows[_ID]), list(rows[_TEXT]), list(rows[_SUMMARY]))
    return [
        Dialogue(name, text, [reference for reference in references if reference is not None])
        for name, text, references in groups[:limit]
    ]


def scoring_rows(
    dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_source: int, max_target: int
) -> Dataset:
    """One row per reference: input_ids, attention_mask and labels (the reference's token ids)."""
    pairs = [(dialogue.text, reference) for dialogue in dialogues for reference in dialogue.references]
    source = prompt.encode([text for text, _ in pairs], tokenizer, max_source)
    target = tokenizer(text_target=[reference for _, reference in pairs], max_length=max_target, truncation=True)
    return Dataset.from_dict({**source, "labels": target.input_ids})


def generation_rows(
    dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_source: int
) -> Dataset:
    """One row per dialogue, without labels."""
    return Dataset.from_dict(prompt.encode([dialogue.text for dialogue in dialogues], tokenizer, max_source))
