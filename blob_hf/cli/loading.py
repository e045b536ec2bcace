"""Where base model and tokenizer come from, as arguments, and loading them."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from blob_hf.tuner.adapter_files import read_config, resolve
from blob_hf.utils.errors import BlobError
from blob_hf.utils.hub import fetching

MAIN = "main"
MODEL_FLAG = "--model_name_or_path"


@dataclass
class LoadingArguments:
    """How a base model and its tokenizer are loaded."""

    config_name: str | None = field(default=None, metadata={"help": "Config, if not the base model's."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the base model's."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep what the Hub sends."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Take the tokenizer in Rust where there is one."})
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the base model; the adapter remembers it. Default: main."},
    )
    token: str | None = field(default=None, metadata={"help": "Hub token. Default: that of `hf auth login`."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with a base model: only of people you trust."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Take a base model whose head has other sizes, and make the head anew."}
    )

    @property
    def revision(self) -> str | None:
        """For the adapter's configuration: None for the main branch."""
        return None if self.model_revision == MAIN else self.model_revision

    def hub(self) -> dict[str, Any]:
        """What every `from_pretrained` takes."""
        return {
            "cache_dir": self.cache_dir, "revision": self.model_revision or MAIN, "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }  # fmt: skip

    def load_config(self, name: str, **changes: Any) -> PreTrainedConfig:
        """The config of a base model, or the one of config_name."""
        what, flag = ("config", "--config_name") if self.config_name else ("model", MODEL_FLAG)
        with fetching(what, self.config_name or name, flag):
            return AutoConfig.from_pretrained(self.config_name or name, **self.hub(), **changes)

    def load_tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a base model, or the one of tokenizer_name."""
        source = self.tokenizer_name or name
        with fetching("tokenizer", source, "--tokenizer_name" if self.tokenizer_name else MODEL_FLAG):
            return AutoTokenizer.from_pretrained(source, use_fast=self.use_fast_tokenizer, **self.hub())

    def load_model(self, kind: Any, name: str, **settings: Any) -> PreTrainedModel:
        """A pretrained base model.

        Args:
            kind: The auto class of the task.
            settings: More for its `from_pretrained`.

        Raises:
            BlobError: It cannot be had, its head is of another size, or it is an encoder that is to write.
        """
        if kind is AutoModelForCausalLM:
            _require_causal(self.load_config(name) if settings.get("config") is None else settings["config"], name)
        try:
            with fetching("model", name, MODEL_FLAG):
                return kind.from_pretrained(
                    name, ignore_mismatched_sizes=self.ignore_mismatched_sizes, **self.hub(), **settings
                )
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise BlobError(
                f"{name} has a head of another size than this task; --ignore_mismatched_sizes true makes a new one"
            ) from error


def _require_causal(config: PreTrainedConfig, name: str) -> None:
    """Refuse an encoder: transformers gives it a head to write with, but its tokens see those that they are to predict.

    Raises:
        BlobError: It is one.
    """
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False) or config.is_encoder_decoder
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal:
        raise BlobError(
            f"{name} is an encoder ({config.model_type}): its tokens see those that follow, so it cannot learn to "
            "write them; choose a causal model such as SmolLM2, Qwen or Llama"
        )


Loading = TypeVar("Loading", bound=LoadingArguments)


def with_saved_revision(args: Loading, base_name: str | None, adapter: str | None) -> Loading:
    """The arguments with the revision of the base model that a saved adapter on this base names, if none is given."""
    if args.model_revision is not None or adapter is None:
        return args
    config = read_config(resolve(adapter))
    if config.base_model_name_or_path != base_name:
        return args
    return dataclasses.replace(args, model_revision=config.revision)
