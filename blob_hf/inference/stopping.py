"""Where an answer ends: at an end token, or where its text has a stop string; each row of a batch on its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from blob_hf.data.conversations import end_of_turn
from blob_hf.inference.predict import IGNORED_LABEL
from blob_hf.tuner.model import BlobModel
from blob_hf.utils.errors import BlobError

_MARGIN = 8  # tokens more than a stop string can have: decoding may change those at its start


class StopStrings(StoppingCriteria):
    """Ends a row whose new text has a stop string. (transformers' own looks at the prompt, too, and keeps the string.)

    Args:
        tokenizer: Of the model.
        strings: Any of them ends a text; the names of special tokens, too.
        start: Tokens of a sequence before the new ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], start: int) -> None:
        self.tokenizer, self.strings, self.start = tokenizer, list(strings), start
        # a token has a byte at least
        self._window = max(len(text.encode()) for text in self.strings) + _MARGIN

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        texts = self._decoded(input_ids[:, self.start :][:, -self._window :])
        return torch.tensor([self.place(text) is not None for text in texts], device=input_ids.device)

    def place(self, text: str) -> int | None:
        """Where the first stop string of a text begins."""
        return min((at for at in map(text.find, self.strings) if at >= 0), default=None)

    def ended(self, tokens: Tensor) -> Tensor:
        """New tokens `(batch, length)`, -100 behind their end: those up to and with the one that ends a stop string."""
        out = tokens.clone()
        for row in out:
            kept = row[row != IGNORED_LABEL]
            if self.place(self._decoded(kept.unsqueeze(0))[0]) is None:
                continue
            prefixes = (self._decoded(kept[None, :count])[0] for count in range(1, len(kept) + 1))
            end = next(count for count, text in enumerate(prefixes, start=1) if self.place(text) is not None)
            row[end:] = IGNORED_LABEL
        return out

    def cut(self, text: str) -> str:
        """A text without its first stop string and what follows."""
        return text[: self.place(text)]

    def _decoded(self, tokens: Tensor) -> list[str]:
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def with_stop_strings(generation: dict[str, Any], start: int) -> dict[str, Any]:
    """Settings of `generate` in which `stop_strings` and `tokenizer` have become a `StopStrings`.

    Args:
        start: Tokens of a sequence before the new ones.

    Raises:
        BlobError: Empty stop strings, or no tokenizer for them.
    """
    strings = generation.get("stop_strings")
    if strings is None:
        return generation
    tokenizer, rest = generation.get("tokenizer"), dict(generation)
    del rest["stop_strings"]
    rest.pop("tokenizer", None)
    strings = [strings] if isinstance(strings, str) else list(strings)
    if not strings or not all(isinstance(text, str) and text for text in strings):
        raise BlobError(f"stop_strings must be texts that are not empty, got {strings}")
    if tokenizer is None:
        raise BlobError("stop_strings need the tokenizer: pass tokenizer=")
    own = StopStrings(tokenizer, strings, start)
    return rest | {"stopping_criteria": StoppingCriteriaList([*(rest.get("stopping_criteria") or []), own])}


def stop_strings_of(generation: dict[str, Any]) -> StopStrings | None:
    """The one that `with_stop_strings` has made."""
    criteria = generation.get("stopping_criteria") or []
    return next((one for one in criteria if isinstance(one, StopStrings)), None)


def end_tokens(model: BlobModel, tokenizer: PreTrainedTokenizerBase, of_turns: bool) -> list[int]:
    """What ends a causal model's answer: the end tokens that it knows, and those that fine-tuning closes texts with.

    (A base model's own end token is often not that of the chat template it is fine-tuned with.)

    Args:
        of_turns: Whether the prompts are conversations.
    """
    config: Any = model.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    found = [*known, tokenizer.eos_token_id, end_of_turn(tokenizer) if of_turns else None]
    return list(dict.fromkeys(int(token) for token in found if token is not None))
