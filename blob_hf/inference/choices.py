"""Multiple choice with a model that writes: the probabilities of the choices, as a classifier's of its classes.

`letter`: a softmax over the logits of the choices' letters after the prompt (Wang et al., NeurIPS 2024). `text`: a
softmax over the log-likelihoods of the texts of the choices, whole or per character. Either way a forward of the model
gives `(rows, choices)` logits, so that training, the posterior predictive, calibration and reports are those of a
classifier. A choice that a row does not have gets no probability.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from blob_hf.data.multiple_choice import PUBLISHED, Asking, questions, table, tokenize_choices
from blob_hf.inference.cut_head import cut_head
from blob_hf.tuner.base_model import call_classes
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.registry import Companion, register_companion
from blob_hf.utils.errors import BlobError

SCORINGS = ("letter", "text")
NORMALIZATIONS = ("none", "characters", "tokens")
ASKED_BY = "num_choices"  # the input by which a batch asks for choices
LETTERS = tuple(ascii_uppercase)
NO_CHOICE = -1e9  # finite: its probability is 0, and 0 times its log is 0, not NaN
FILE_NAME = "multiple_choice.json"


@register_companion
@dataclass(frozen=True)
class ChoiceScoring(Companion):
    """How an adapter answers questions of multiple choice; kept with it.

    Attributes:
        scoring: `letter` or `text`.
        tokens: Of the letters, in their order; of `text` as many zeros as there may be choices.
        normalization: Of a text's log-likelihood: by nothing, its characters or its tokens.
        letter_prompt, text_prompt, answers, fills_blank: How a question is asked, see `Asking`.
        max_length: Of a prompt, in tokens.

    Raises:
        BlobError: Not one of these.
    """

    scoring: str = "letter"
    tokens: tuple[int, ...] = ()
    normalization: str = "none"
    letter_prompt: str = PUBLISHED.letter
    text_prompt: str = PUBLISHED.text
    answers: tuple[str, ...] = ()
    fills_blank: bool = False
    max_length: int = 300

    slot = "choices"
    files = (FILE_NAME,)
    name = "multiple choice"
    asked_by = ASKED_BY

    def __post_init__(self) -> None:
        for field, allowed in (("scoring", SCORINGS), ("normalization", NORMALIZATIONS)):
            if getattr(self, field) not in allowed:
                raise BlobError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        if not 2 <= len(self.tokens) <= len(LETTERS):
            raise BlobError(f"a question has 2 to {len(LETTERS)} choices, got {len(self.tokens)}")
        if self.scoring == "letter" and len(set(self.tokens)) < len(self.tokens):
            raise BlobError("two answers have the same token; use the scoring of texts")

    @classmethod
    def of(
        cls, asking: Asking, scoring: str, width: int, tokenizer: PreTrainedTokenizerBase, normalization: str,
        max_length: int,
    ) -> "ChoiceScoring":  # fmt: skip
        """How a new adapter answers questions of at most `width` choices.

        Raises:
            BlobError: An answer has no token of its own, or a setting is unknown.
        """
        letters = scoring == "letter"
        words = asking.answer_words(width)
        tokens = answer_tokens(tokenizer, words, asking.letter) if letters else (0,) * width
        how = (asking.letter, asking.text, asking.answers if letters else (), asking.fills_blank)
        return cls(scoring, tokens, normalization, *how, max_length)

    @property
    def asking(self) -> Asking:
        """The templates of a question."""
        return Asking(self.letter_prompt, self.text_prompt, answers=self.answers, fills_blank=self.fills_blank)

    @property
    def names(self) -> list[str]:
        """Of the choices: their letters, or the words that stand for them."""
        return list(self.asking.answer_words(len(self.tokens)))

    def check_width(self, most: int) -> None:
        """Refuse questions with more choices than there are answers for.

        Raises:
            BlobError: They have.
        """
        if most > len(self.tokens):
            raise BlobError(
                f"a question has {most} choices, but the adapter answers with at most {len(self.tokens)}: "
                f"{', '.join(self.names)}"
            )

    def check_answers(self, other: Asking, name: str) -> None:
        """Refuse another task whose questions are answered by other words.

        Raises:
            BlobError: They are.
        """
        if self.scoring == "letter" and other.answers != self.answers:
            words, own = (", ".join(one) or "letters" for one in (other.answers, self.answers))
            raise BlobError(f"{name} is answered by {words}, but here by {own}; use the scoring of texts")

    def answer(
        self, model: BlobModel, network: Callable[..., Any], inputs: Mapping[str, Any]
    ) -> SequenceClassifierOutput:
        """Logits `(rows, choices)` of a batch of `ChoiceCollator`; softmax of them are the probabilities."""
        inputs = dict(inputs)
        counts = inputs.pop(ASKED_BY)
        letters = self.scoring == "letter"
        scores = self._of_letters(model, network, inputs) if letters else self._of_texts(network, inputs)
        scores = F.pad(scores.float(), (0, len(self.tokens) - scores.shape[1]))
        missing = torch.arange(len(self.tokens), device=scores.device) >= counts.unsqueeze(1)
        return SequenceClassifierOutput(logits=scores.masked_fill(missing, NO_CHOICE))

    def _of_letters(self, model: BlobModel, network: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
        """Logits of the letters at the last position, which is the same for all rows: they are padded on the left."""
        with cut_head(model, self.tokens) as cut:
            logits = network(**_positioned(inputs), logits_to_keep=1).logits[:, -1]
        return logits if cut.done else logits.index_select(1, torch.tensor(self.tokens, device=logits.device))

    def _of_texts(self, network: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
        """Log-likelihood of each choice's text after its context, divided by its length; (rows, choices, length) in."""
        of_choice, lengths = inputs.pop("choice_mask"), inputs.pop("choice_lengths")
        rows, choices, _ = of_choice.shape
        flat = {name: value.flatten(0, 1) for name, value in inputs.items()}
        kept = int(of_choice.shape[2] - of_choice.flatten(0, 1).any(0).int().argmax()) + 1
        logits = network(**_positioned(flat), logits_to_keep=kept).logits[:, :-1]
        targets = flat["input_ids"][:, -kept + 1 :]
        nll = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        scores = -(nll * of_choice.flatten(0, 1)[:, -kept + 1 :]).sum(1).view(rows, choices)
        return scores / lengths.clamp(min=1)

    @classmethod
    def load(cls, folder: Path) -> "ChoiceScoring | None":
        file = folder / FILE_NAME
        if not file.is_file():
            return None
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{**settings, "tokens": tuple(settings["tokens"]), "answers": tuple(settings["answers"])})
        except (ValueError, TypeError, KeyError) as error:
            raise BlobError(f"{file} is damaged ({error}); get the adapter again") from error

    def attach(self, model: BlobModel, folder: Path) -> None:
        call_classes(model.get_base_model(), self.names)

    def save(self, model: BlobModel, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    def settings(self) -> dict[str, object]:
        found: dict[str, object] = {"scoring": self.scoring}
        return found | ({"length normalization": self.normalization} if self.scoring == "text" else {})


def answer_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], before: str) -> tuple[int, ...]:
    """The token of each answer, a letter or a word, as it follows a prompt.

    Args:
        before: What the prompt ends with.

    Raises:
        BlobError: The tokenizer splits an answer, or merges it with what is before.
    """
    start = tokenizer(before).input_ids
    found = []
    for word in words:
        whole = tokenizer(f"{before} {word}").input_ids
        if whole[:-1] != start:
            raise BlobError(
                f"the tokenizer has no token for the answer {' ' + word!r} after {before[-12:]!r}; "
                "use the scoring of texts"
            )
        found.append(whole[-1])
    return tuple(found)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows up; what it is makes no difference behind the attention mask.

    Raises:
        BlobError: The tokenizer has neither a padding nor an end token.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise BlobError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token and save it")


def _positioned(inputs: dict[str, Any]) -> dict[str, Any]:
    """With the positions that left padding leaves out: transformers' forward counts padding, too."""
    mask = inputs["attention_mask"]
    return {**inputs, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@dataclass(frozen=True)
class ChoiceCollator:
    """Questions to a batch, padded on the left: all of them end where the answer begins.

    Attributes:
        pad: Token that fills up.
        scoring: As of `ChoiceScoring`.
    """

    pad: int
    scoring: str

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        of_letters = self.scoring == "letter"
        batch = self._padded([row["input_ids"] for row in rows]) if of_letters else self._texts(rows)
        batch[ASKED_BY] = torch.tensor([row[ASKED_BY] for row in rows])
        if all(row.get("labels") is not None for row in rows):
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """As many choices as the row with the most has; those that others do not have are a single token."""
        width = max(len(row["input_ids"]) for row in rows)
        empty: list[int] = [self.pad]
        sequences, counts, lengths = [], [], []
        for row in rows:
            missing = width - len(row["input_ids"])
            sequences += [*row["input_ids"], *[empty] * missing]
            counts += [*row["choice_tokens"], *[0] * missing]
            lengths += [*row["choice_lengths"], *[1.0] * missing]
        batch = self._padded(sequences)
        place = torch.arange(batch["input_ids"].shape[1])
        batch["choice_mask"] = place >= place.numel() - torch.tensor(counts).unsqueeze(1)
        batch = {name: value.unflatten(0, (len(rows), width)) for name, value in batch.items()}
        return batch | {"choice_lengths": torch.tensor(lengths).view(len(rows), width)}

    def _padded(self, sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        longest = max(map(len, sequences))
        # where a whole row of the mask is padding, cuDNN's attention of torch 2.11 to 2.13 has NaN gradients at these
        # lengths (Hopper GPUs, https://github.com/pytorch/pytorch/issues/196678)
        longest += longest % 128 == 64
        ids = [[self.pad] * (longest - len(one)) + list(one) for one in sequences]
        mask = [[0] * (longest - len(one)) + [1] * len(one) for one in sequences]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


# ----- for `BlobModel.predict` ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceRows:
    """Tokenized questions, in batches of similar length."""

    rows: Sequence[Mapping[str, Any]]
    collate: ChoiceCollator

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, batch_size: int) -> Iterator[list[int]]:
        """Indices of the rows of each batch, the longest first."""
        order = sorted(range(len(self)), key=lambda index: -len(str(self.rows[index]["input_ids"])))
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """These rows, without labels."""
        found = self.collate([{**self.rows[index], "labels": None} for index in indices])
        return {name: value.to(device) for name, value in found.items()}


def is_questions(inputs: Any) -> bool:
    """Whether inputs are questions: a dict with choices, a list of them, or a data set with such a column."""
    if isinstance(inputs, Dataset):
        return "choices" in inputs.column_names
    first = inputs[0] if isinstance(inputs, (list, tuple)) and inputs else inputs
    return isinstance(first, Mapping) and "choices" in first


def choice_rows(
    inputs: Any, scoring: ChoiceScoring, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> ChoiceRows:
    """Questions as `predict` takes them, asked as the adapter was trained to be.

    Raises:
        BlobError: A question cannot be read, or has more choices than the adapter knows.
    """
    if not isinstance(inputs, Dataset):
        listed = [inputs] if isinstance(inputs, Mapping) else list(inputs)
        inputs = table(listed)
    asked = questions(inputs, labelled=False)
    scoring.check_width(max(map(len, asked["choices"])))
    limit = max_length or scoring.max_length
    tokenized = tokenize_choices(asked, tokenizer, scoring.asking, scoring.scoring, limit, scoring.normalization)
    return ChoiceRows(tokenized.to_list(), ChoiceCollator(padding_token(tokenizer), scoring.scoring))
