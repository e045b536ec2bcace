"""`BlobConfig`: a `LoraConfig` with the four fields of the Gaussian posterior, and target modules by model family."""

import warnings
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType

from blob_hf.utils.errors import BlobError

STD_PARAMETERIZATIONS = ("square", "softplus")
NOISES = ("flipout", "local", "shared")

# Values of init_lora_weights that take a part out of the base model's weights, and those that BLoB refuses.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_FROM_DATA = (
    "takes a part out of the base weights that depends on data: loading the adapter could not take it out again"
)
_REFUSED_INITS = {
    "pissa_niter": "starts from a random decomposition: loading the adapter would find another one; use 'pissa'",
    "corda": _FROM_DATA,
    "lora_ga": _FROM_DATA,
    "loftq": "replaces the base weights by quantised ones; load the base model quantised instead (bitsandbytes)",
}
# Fields of LoraConfig that make it something else than plain LoRA, beside those that PEFT marks as variants.
_REFUSED_FIELDS = {
    "use_qalora": "it pools what A reads, for GPTQ bases",
    "megatron_config": "its layers shard A",
}

# What LoRA is attached to, by `config.model_type`: the published settings for RoBERTa and BART, their equivalents
# for BERT and T5. A classification head in the list gets LoRA on frozen random weights (as published).
CLASSIFICATION_TARGETS = {
    "roberta": ["query", "value", "classifier.dense", "classifier.out_proj"],
    "bert": ["query", "value", "classifier"],
    "bart": ["q_proj", "v_proj", "classification_head.dense", "classification_head.out_proj"],
    "t5": ["q", "v", "classification_head.dense", "classification_head.out_proj"],
}
# What the published experiments on Llama adapt, and its equivalents.
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")
CHOICE_TARGETS = {
    **{family: ["q_proj", "v_proj", "lm_head"] for family in _LLAMA_LIKE},
    "gpt2": ["c_attn", "lm_head"],
}
# Of a model that writes texts the same without its head, on which TRL has no adapter.
TEXT_TARGETS = {family: [name for name in targets if name != "lm_head"] for family, targets in CHOICE_TARGETS.items()}
SEQ2SEQ_TARGETS = {
    "bart": ["q_proj", "k_proj", "v_proj", "lm_head"],
    "t5": ["q", "k", "v", "lm_head"],
}


@dataclass
class BlobConfig(LoraConfig):
    """Configuration of a BLoB adapter (Wang et al., NeurIPS 2024): every `LoraConfig` field, and those of q(A).

    Args:
        prior_std: Standard deviation sigma_p of the prior p(A_ij) = N(0, sigma_p^2); the paper's beta.
        init_eps: Scale of the initial posterior std: G ~ U(init_eps / sqrt(2), init_eps), std = G^2.
        std_parameterization: How the trained parameter gives the std: `"square"` (std = G * G, the paper's) or
            `"softplus"` (std = log(1 + exp(rho))). Both start from the same stds.
        noise: Training-time noise estimator, one of `"flipout"`, `"local"`, `"shared"` (see `noise.py`).
        posterior_layers: k: only A in the last k layers of the model (and in what comes after them, a head) has a
            posterior, the others are plain LoRA. So the samples of a batch share all below (`trunk.py`). None: all.

    Raises:
        BlobError: A field is outside its range, or a LoRA variant that is not plain LoRA is switched on.
    """

    prior_std: float = field(default=0.2, metadata={"help": "Std of the Gaussian prior on A (beta in the paper)."})
    init_eps: float = field(default=0.05, metadata={"help": "G ~ U(eps/sqrt(2), eps), initial std = G^2."})
    std_parameterization: str = field(default="square", metadata={"help": "'square' or 'softplus'."})
    noise: str = field(default="flipout", metadata={"help": "'flipout', 'local' or 'shared'."})
    posterior_layers: int | None = field(
        default=None, metadata={"help": "Only A in the last so many layers has a posterior; default: all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prior_std", "init_eps"):
            value = getattr(self, name)
            if not value > 0:
                hint = " (prior_std is the paper's beta)" if name == "prior_std" else ""
                raise BlobError(f"{name} must be > 0, got {value}{hint}")
        for name, allowed in (("std_parameterization", STD_PARAMETERIZATIONS), ("noise", NOISES)):
            value = getattr(self, name)
            if value not in allowed:
                raise BlobError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        patterns = {f"rank_pattern[{key!r}]": rank for key, rank in (self.rank_pattern or {}).items()}
        for name, rank in {"r": self.r, **patterns}.items():
            if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
                raise BlobError(f"{name} must be an integer >= 1 (the rank of LoRA), got {rank!r}")
        layers = self.posterior_layers
        if layers is not None and (isinstance(layers, bool) or not isinstance(layers, Integral) or layers < 1):
            raise BlobError(f"posterior_layers must be an integer >= 1 (the last layers of the model), got {layers!r}")
        self._refuse_other_methods()

    def _refuse_other_methods(self) -> None:
        for item in fields(LoraConfig):
            if (item.metadata.get("is_lora_variant") or item.name in _REFUSED_FIELDS) and getattr(self, item.name):
                reason = f" ({_REFUSED_FIELDS[item.name]})" if item.name in _REFUSED_FIELDS else ""
                raise BlobError(
                    f"BLoB is a posterior over plain LoRA; switch off {item.name}={getattr(self, item.name)!r}{reason}"
                )
        init = str(self.init_lora_weights).lower()
        for name, reason in _REFUSED_INITS.items():
            if init.startswith(name):
                raise BlobError(f"init_lora_weights={self.init_lora_weights!r} {reason}")

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> "BlobConfig":
        """Build from the fields of an adapter_config.json, of BLoB or of plain LoRA (PEFT's loading hook).

        PEFT would pick the class by `peft_type`, which is LORA for both so that plain PEFT can load our files.
        """
        peft_type = kwargs.pop("peft_type", PeftType.LORA)
        if peft_type != PeftType.LORA:
            raise BlobError(f"BLoB needs a LoRA adapter, but this one has peft_type {peft_type!s}")
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            warnings.warn(
                f"adapter_config.json has fields that this version does not know, ignored: {unknown}", stacklevel=2
            )
        return cls(**{name: value for name, value in kwargs.items() if name in known})

    @classmethod
    def from_lora(cls, lora: LoraConfig, posterior: "BlobConfig | None" = None) -> "BlobConfig":
        """The LoRA fields of one config with the posterior fields of another (defaults if None)."""
        kwargs = _lora_fields(lora)
        own = {item.name for item in fields(cls)} - {item.name for item in fields(LoraConfig)}
        if posterior is not None:
            kwargs.update({name: getattr(posterior, name) for name in own})
        return cls(**kwargs)

    def to_lora(self) -> LoraConfig:
        """The LoRA fields alone, as a plain `LoraConfig`."""
        return LoraConfig(**_lora_fields(self))


def changes_base(config: PeftConfig) -> bool:
    """Whether attaching an adapter of this configuration changes the weights of the base model."""
    return str(getattr(config, "init_lora_weights", True)).lower().startswith(_CHANGES_BASE)


def _lora_fields(config: LoraConfig) -> dict[str, Any]:
    return {
        item.name: getattr(config, item.name) for item in fields(LoraConfig) if item.init and item.name != "peft_type"
    }


def default_target_modules(model_type: str, task: str) -> list[str] | str:
    """Target modules for a model family, or PEFT's `"all-linear"` for one without a preset.

    Args:
        model_type: `config.model_type` of the base model, for example `"roberta"`.
        task: `"classification"`, `"summarization"`, `"choices"` or `"text"`.
    """
    presets = {
        "classification": CLASSIFICATION_TARGETS, "summarization": SEQ2SEQ_TARGETS, "choices": CHOICE_TARGETS,
        "text": TEXT_TARGETS,
    }[task]  # fmt: skip
    return presets.get(model_type, "all-linear")
