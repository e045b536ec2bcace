"""What a run on multiple choice asks of a saved adapter and of a tokenizer."""

from transformers import PreTrainedTokenizerBase

from blob_hf.inference.choices import ChoiceScoring
from blob_hf.tuner.adapter_files import resolve
from blob_hf.utils.errors import BlobError


def saved_scoring(adapter: str | None) -> ChoiceScoring | None:
    """How a saved adapter answers questions; None for a new one, or one of another task."""
    return None if adapter is None else ChoiceScoring.load(resolve(adapter))


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows up; what it is makes no difference behind the attention mask.

    Raises:
        BlobError: The tokenizer has neither a padding nor an end token.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise BlobError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token and save it")
