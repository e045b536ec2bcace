"""From what a user has (texts, conversations, a tokenized batch, a dataset) to the rows that a model reads."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from blob_hf.data.conversations import is_conversation
from blob_hf.inference.choices import ChoiceRows
from blob_hf.inference.texts import LABELS, Inputs, Text, encode, prompts_of, question, texts_of
from blob_hf.tuner.adapter_files import TOKENIZER_FILES
from blob_hf.tuner.base_model import is_sequence_classifier
from blob_hf.tuner.model import BlobModel
from blob_hf.utils.errors import BlobError

Part = TypeVar("Part")
_NO_LIMIT = 1_000_000  # tokenizers that know no longest input say 1e30


@dataclass(frozen=True)
class Rows:
    """Model inputs by name, one tensor a row: lengths may differ until rows are put into a batch.

    Attributes:
        texts: What they were made of; none of a tokenized batch.
    """

    columns: dict[str, list[Tensor]]
    padding: dict[str, int]
    pads_left: bool = False
    texts: Sequence[Text] = ()

    @property
    def questions(self) -> list[str]:
        """What each row asks; "" of a tokenized batch."""
        return [question(text) for text in self.texts] or [""] * len(self)

    @property
    def has_conversations(self) -> bool:
        """Whether any row is of messages."""
        return any(is_conversation(text) for text in self.texts)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def batches(self, batch_size: int) -> Iterator[list[int]]:
        """Indices of the rows of each batch, of similar length together, the longest first."""
        lengths = [len(row) for row in next(iter(self.columns.values()))]
        order = sorted(range(len(self)), key=lambda index: -lengths[index])
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """These rows, padded to the longest of them."""
        return {name: self._together(name, indices).to(device) for name in self.columns}

    def _together(self, name: str, indices: Sequence[int]) -> Tensor:
        rows = [self.columns[name][index] for index in indices]
        if len({row.shape for row in rows}) == 1:
            return torch.stack(rows)
        if name not in self.padding:
            raise BlobError(f"rows of different lengths cannot be padded: there is no padding value for {name}")
        side = "left" if self.pads_left else "right"
        return pad_sequence(rows, batch_first=True, padding_value=self.padding[name], padding_side=side)


def rows_of(
    model: BlobModel,
    inputs: Inputs,
    tokenizer: PreTrainedTokenizerBase | None = None,
    columns: Sequence[str] | None = None,
    prompt: str | None = None,
    max_length: int | None = None,
    room: int = 0,
) -> Rows:
    """The rows of whatever `BlobModel.predict` is given.

    Args:
        tokenizer: Default that of `find_tokenizer`; not needed for tokenized inputs.
        columns: Of a dataset: one or two with texts; default those of `find_text_columns`.
        prompt: What a model that writes reads for a text, with {dialogue} in the text's place.
        max_length: Longest input in tokens, what is longer is cut; default what tokenizer and model allow.
        room: Tokens of that which the answer of a decoder needs.

    Raises:
        BlobError: Nothing to predict, no texts or token ids in it, or no tokenizer.
    """
    if isinstance(inputs, DatasetDict):
        raise BlobError(f"got a dataset with the splits {', '.join(map(str, inputs))}: give one of them")
    named = inputs.column_names if isinstance(inputs, Dataset) else list(inputs) if isinstance(inputs, Mapping) else []
    texts: Sequence[Text] = ()
    if "input_ids" in named or "inputs_embeds" in named:
        tokens = _tokenized(model, inputs)
        tokenizer = tokenizer or _saved_tokenizer(model)
    else:
        decoder = is_decoder(model)
        texts = prompts_of(inputs, columns) if decoder else texts_of(inputs, columns)
        tokenizer = tokenizer or find_tokenizer(model)
        limit = max_length or longest_input(model, tokenizer) - room
        if limit < 1:
            raise BlobError(f"{room} new tokens leave no room for a text: the model takes {limit + room}")
        encoded = encode(texts, tokenizer, prompt, limit, decoder)
        tokens = {name: list(map(torch.as_tensor, values)) for name, values in encoded.items()}
        tokens = {name: value for name, value in tokens.items() if name in _accepted(model)}
    if not tokens or not len(next(iter(tokens.values()))):
        raise BlobError("there is nothing to predict: the input has no rows")
    return Rows(tokens, _padding(model, tokenizer), pads_left=is_decoder(model), texts=texts)


def in_batches(
    model: BlobModel,
    rows: Rows | ChoiceRows,
    batch_size: int,
    make: Callable[[dict[str, Tensor]], Sequence[Part]],
    only: Sequence[int] | None = None,
) -> list[Part]:
    """What `make` gives for each row, in the order of the rows.

    Args:
        only: Indices of the rows that are asked for, in their order.
    """
    wanted = range(len(rows)) if only is None else only
    chosen = set(wanted)
    order = [index for batch in rows.batches(len(rows)) for index in batch if index in chosen]
    found: dict[int, Part] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        found |= zip(indices, make(rows.batch(indices, model.device)), strict=True)
    return [found[index] for index in wanted]


def _tokenized(model: BlobModel, inputs: Any) -> dict[str, list[Tensor]]:
    """Rows of a batch or dataset that holds token ids; what the model does not take is left out."""
    names = inputs.column_names if isinstance(inputs, Dataset) else list(inputs)
    names = [name for name in names if name in _accepted(model)]
    if not {"input_ids", "inputs_embeds"} & set(names):
        raise BlobError(f"{type(model.get_base_model()).__name__} needs input_ids to write from")
    names.sort(key=lambda name: name not in ("input_ids", "inputs_embeds"))  # rows are sorted by the first one's length
    columns = {}
    for name in names:
        values = list(inputs[name])
        single = bool(values) and torch.as_tensor(values[0]).dim() == 0
        columns[name] = [torch.as_tensor(inputs[name])] if single else [torch.as_tensor(value) for value in values]
    counts = {name: len(rows) for name, rows in columns.items()}
    if len(set(counts.values())) > 1:
        raise BlobError(f"the inputs have different numbers of rows: {counts}")
    return columns


def _accepted(model: BlobModel) -> set[str]:
    """Names of the inputs that the model is given."""
    base: Any = model.get_base_model()
    if not is_sequence_classifier(base):
        return {"input_ids", "attention_mask"}  # what `generate` goes on from, and texts are read back with
    return set(inspect.signature(base.forward).parameters) - set(LABELS)


def is_decoder(model: BlobModel) -> bool:
    """Whether it goes on from its input, which therefore is padded on the left."""
    base: Any = model.get_base_model()
    return not base.config.is_encoder_decoder and type(base).__name__.endswith(("LMHeadModel", "ForCausalLM"))


def _padding(model: BlobModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int]:
    base: Any = model.get_base_model()
    config = base.config
    ids = [getattr(tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None)]
    if is_decoder(model):  # padding on the left is masked: any token does
        ids += [getattr(tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None), 0]
    known = [value for value in ids if isinstance(value, int)]
    types = getattr(tokenizer, "pad_token_type_id", 0)
    return {"attention_mask": 0, "token_type_ids": types, **({"input_ids": known[0]} if known else {})}


# ----- the tokenizer ---------------------------------------------------------------------------------------------


def find_tokenizer(model: BlobModel) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the active adapter, else the base model's; found once for a model.

    Raises:
        BlobError: There is none.
    """
    found = _saved_tokenizer(model)
    if found is not None:
        return found
    base: Any = model.get_base_model()
    name, folder = base.name_or_path, model.folders.get(str(model.active_adapter))
    where = f"with the adapter in {folder}" if folder is not None else "with the adapter, which was not loaded"
    if not name:
        raise BlobError(
            f"no tokenizer is saved {where}, and the base model has no name to find one by; pass tokenizer="
        )
    missing = f"no tokenizer is saved {where}, and none can be had of its base model {name!r}; pass tokenizer="
    if Path(name).is_dir() and not any(found for part in TOKENIZER_FILES for found in Path(name).glob(part)):
        raise BlobError(missing)  # from a config alone transformers makes a tokenizer that knows no word
    try:
        model.tokenizers[str(model.active_adapter)] = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BlobError(missing) from error
    return model.tokenizers[str(model.active_adapter)]


def _saved_tokenizer(model: BlobModel) -> PreTrainedTokenizerBase | None:
    adapter = str(model.active_adapter)
    folder = model.folders.get(adapter)
    if adapter not in model.tokenizers and folder is not None and (folder / "tokenizer_config.json").is_file():
        model.tokenizers[adapter] = AutoTokenizer.from_pretrained(str(folder))
    return model.tokenizers.get(adapter)


def longest_input(model: BlobModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that tokenizer and model take."""
    limits = [int(tokenizer.model_max_length)] if tokenizer.model_max_length < _NO_LIMIT else []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", ".wpe")):
            # RoBERTa's positions start behind the padding's
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    config: Any = model.get_base_model().config
    limits.append(getattr(config, "max_position_embeddings", None) or _NO_LIMIT)
    return min(limits)
