"""What transformers' summarization script knows beside: languages of multilingual models, lengths in evaluation."""

import logging
from dataclasses import dataclass, field
from typing import Any

from blob_hf.cli.rows import RowArguments
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)


@dataclass
class TextArguments(RowArguments):
    """How summaries are read and written, by the names of transformers' script."""

    source_prefix: str | None = field(
        default=None, metadata={"help": "Short for --prompt 'PREFIX{dialogue}', e.g. 'summarize: ' for T5."}
    )
    val_max_target_length: int | None = field(
        default=None, metadata={"help": "Longest reference and summary in evaluation. Default: max_target_length."}
    )
    ignore_pad_token_for_loss: bool = field(default=True, metadata={"help": "Always: padding has no NLL."})
    lang: str | None = field(default=None, metadata={"help": "Language of a multilingual model, e.g. en_XX of mBART."})
    forced_bos_token: str | None = field(
        default=None, metadata={"help": "First token of every summary, for multilingual models its language."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ignore_pad_token_for_loss:
            raise BlobError("--ignore_pad_token_for_loss false would train on padding; leave it out")
        if self.val_max_target_length is not None and self.val_max_target_length < 1:
            raise BlobError(f"--val_max_target_length must be >= 1, got {self.val_max_target_length}")

    def warn_of_unused(self) -> None:
        """Say that tokenizing is not spread over processes: it is one call for all texts of a split."""
        if self.preprocessing_num_workers is not None or self.overwrite_cache:
            logger.info("texts are tokenized in one call a split, without workers and without a cache")

    def set_language(self, base: Any, tokenizer: Any) -> None:
        """Tell a multilingual model and its tokenizer which language they read and write.

        Raises:
            BlobError: They know no languages, or not this one.
        """
        if self.lang is not None:
            if not hasattr(tokenizer, "src_lang"):
                raise BlobError(
                    f"--lang {self.lang}: {type(tokenizer).__name__} knows no languages; it is for models like mBART"
                )
            token = _token_id(tokenizer, self.lang, "--lang")
            tokenizer.src_lang = tokenizer.tgt_lang = self.lang
            if base.config.decoder_start_token_id is None:
                base.config.decoder_start_token_id = base.generation_config.decoder_start_token_id = token
        if self.forced_bos_token is not None:
            token = _token_id(tokenizer, self.forced_bos_token, "--forced_bos_token")
            base.generation_config.forced_bos_token_id = token


def _token_id(tokenizer: Any, token: str, flag: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id:
        raise BlobError(f"{flag} {token} is no token of {type(tokenizer).__name__}")
    return found
