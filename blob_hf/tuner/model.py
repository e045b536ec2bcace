"""`BlobModel`: a `PeftModel` whose LoRA adapters carry a Gaussian posterior over A. Build, save and load it here."""

import os
from contextlib import AbstractContextManager
from typing import Any

from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftType,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from blob_hf.baselines import find_method, read_facts
from blob_hf.inference.generate import generate_posterior
from blob_hf.tuner import adapter_files, posterior
from blob_hf.tuner.base_model import load_base_model, targets_head, untie_adapted_layers
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.sampled import SampledLinear
from blob_hf.tuner.saving import SavingMixin
from blob_hf.utils.errors import BlobError


class BlobModel(SavingMixin):
    """A PEFT model with a posterior over the LoRA A matrices; everything a `PeftModel` does, it does.

    In train mode each forward draws noise (`BlobConfig.noise`); in eval mode the model is the posterior mean, unless
    samples are frozen by `posterior_samples`. Subclasses add PEFT's task-specific forward; build one with
    `get_blob_model`, `bayesianize` or `BlobModel.from_pretrained`.
    """

    @property
    def blob_config(self) -> BlobConfig:
        """The active adapter's configuration."""
        config = self.active_peft_config
        if not isinstance(config, BlobConfig):
            raise BlobError(f"the active adapter {self.active_adapter!r} has no posterior; bayesianize it first")
        return config

    def posterior_mean(self) -> AbstractContextManager[None]:
        """Context in which the network is the posterior mean, also in train mode."""
        return posterior.posterior_mean(self)

    def posterior_samples(
        self, num_samples: int, seed: int = 0, first: int = 0, antithetic: bool = False
    ) -> AbstractContextManager[None]:
        """Context in which the network is `num_samples` frozen posterior samples over sample-major rows.

        See `blob_hf.posterior.posterior_samples`.
        """
        return posterior.posterior_samples(self, num_samples, seed, first, antithetic)

    def kl_divergence(self) -> Tensor:
        """KL(q || p) of the active adapters, nats (scalar, differentiable)."""
        return posterior.kl_divergence(self, self.blob_config.prior_std)

    def posterior_statistics(self) -> posterior.PosteriorStatistics:
        """Std, KL (nats) and signal-to-noise ratio, per layer and in total."""
        return posterior.posterior_statistics(self, self.blob_config.prior_std)

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        if isinstance(peft_config, BlobConfig):
            posterior.attach_posterior(self, peft_config, adapter_name)

    def generate(  # type: ignore[override]
        self,
        *args: Any,
        num_posterior_samples: int | None = None,
        posterior_seed: int = 0,
        posterior_batch_size: int | None = None,
        posterior_antithetic: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; with `num_posterior_samples` a text from each of so many posterior samples.

        Args:
            num_posterior_samples: S: returns `(batch * S, length)`, all samples of input 0 first, as
                `num_return_sequences` orders them. None generates with the network as it is (in eval mode the mean).
            posterior_seed: Names the samples.
            posterior_batch_size: Samples decoded together, to bound memory; default all.
            posterior_antithetic: Samples in pairs (see `posterior_samples`).

        Raises:
            BlobError: See `blob_hf.generation.generate_posterior`.
        """
        if num_posterior_samples is None:
            return super().generate(*args, **kwargs)
        if args:
            kwargs["input_ids"] = args[0]
        return generate_posterior(
            self, num_posterior_samples, posterior_seed, posterior_batch_size, posterior_antithetic, **kwargs
        )

    def merge_posterior_sample(self, seed: int = 0, index: int = 0) -> nn.Module:
        """Merge one posterior sample into the base weights, as `merge_and_unload` does the posterior mean.

        Args:
            seed, index: Sample `index` of `posterior_samples(..., seed)`.

        Returns:
            The base model, an ordinary transformers model; the adapter is gone from it.

        Raises:
            BlobError: No posterior, or merged already.
        """
        for layer in posterior.samplable_layers(self):
            layer.fix_at_sample(seed, index)
        return self.merge_and_unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge the posterior mean into the base weights: PEFT's, after untying an `lm_head` that has LoRA."""
        untie_adapted_layers(self)
        tuner: Any = self.base_model
        base = tuner.merge_and_unload(*args, **kwargs)
        for path, module in list(base.named_modules()):  # the head of an ensemble
            if isinstance(module, SampledLinear):
                parent, _, name = path.rpartition(".")
                setattr(base.get_submodule(parent), name, module.plain())
        return base

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Merge without unloading: PEFT's, after untying an `lm_head` that has LoRA."""
        untie_adapted_layers(self)
        tuner: Any = self.base_model
        tuner.merge_adapter(*args, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path_or_repo: str | os.PathLike[str],
        model: PreTrainedModel | None = None,
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        config: BlobConfig | None = None,
        **base_kwargs: Any,
    ) -> "BlobModel":
        """Load an adapter folder or Hub repo, finding the base model and the task class by itself.

        Args:
            path_or_repo: Folder or Hub repo of a BLoB adapter, of another method's (method.json names it), or of a
                plain LoRA adapter, which gets fresh stds.
            model: The base model, if you have it already; found through adapter_config.json otherwise.
            is_trainable: Load for further training.
            revision: Branch, tag or commit of the repo; all files are of this one commit.
            subfolder: Where in the folder or repo the adapter is.
            token: For a private repo; default is that of `hf auth login`.
            config: Posterior settings (`prior_std`, `init_eps` ...) for a plain LoRA adapter; a BLoB adapter has its
                own.
            base_kwargs: Passed to the base model's `from_pretrained` (`dtype`, `device_map`, `num_labels` ...).

        Returns:
            The model in eval mode (train mode settings are up to you when is_trainable).

        Raises:
            BlobError: Not an adapter, damaged, of another base model, or its base model cannot be found.
        """
        folder = adapter_files.resolve(path_or_repo, revision, subfolder, token, cache_dir)
        is_blob = adapter_files.is_blob_adapter(folder)
        own = BlobConfig.from_pretrained(str(folder))
        facts = read_facts(folder)
        if not is_blob:
            own = BlobConfig.from_lora(own, config)
        own.inference_mode = not is_trainable
        if model is None:
            model = load_base_model(str(folder), own, token, base_kwargs)
        if facts and not is_blob:
            blob_model = _wrap(model, own.to_lora(), adapter_name)
        else:
            blob_model = bayesianize(_wrap(model, own, adapter_name), own, adapter_name)
        blob_model.load_adapter(folder, adapter_name, is_trainable=is_trainable)
        blob_model.method_facts = facts
        if facts:
            find_method(facts["method"]).attach(blob_model, facts, folder)
        return blob_model


class BlobModelForSequenceClassification(BlobModel, PeftModelForSequenceClassification):
    """`BlobModel` with a classification head that PEFT trains in full (task_type SEQ_CLS)."""


class BlobModelForSeq2SeqLM(BlobModel, PeftModelForSeq2SeqLM):
    """`BlobModel` for encoder-decoder models."""


class BlobModelForCausalLM(BlobModel, PeftModelForCausalLM):
    """`BlobModel` for decoder-only models."""


class BlobModelForTokenClassification(BlobModel, PeftModelForTokenClassification):
    """`BlobModel` for token classification."""


class BlobModelForQuestionAnswering(BlobModel, PeftModelForQuestionAnswering):
    """`BlobModel` for extractive question answering."""


class BlobModelForFeatureExtraction(BlobModel, PeftModelForFeatureExtraction):
    """`BlobModel` for embeddings."""


_BLOB_CLASSES: dict[type[PeftModel], type[BlobModel]] = {
    PeftModel: BlobModel,
    PeftModelForSequenceClassification: BlobModelForSequenceClassification,
    PeftModelForSeq2SeqLM: BlobModelForSeq2SeqLM,
    PeftModelForCausalLM: BlobModelForCausalLM,
    PeftModelForTokenClassification: BlobModelForTokenClassification,
    PeftModelForQuestionAnswering: BlobModelForQuestionAnswering,
    PeftModelForFeatureExtraction: BlobModelForFeatureExtraction,
}


def get_blob_model(model: PreTrainedModel, config: BlobConfig, adapter_name: str = "default") -> BlobModel:
    """Put a fresh BLoB adapter on a model: the counterpart of `peft.get_peft_model`.

    With task_type SEQ_CLS, PEFT trains the classification head in full. When `target_modules` names layers *of the
    head*, as the paper does, the head instead stays frozen under its LoRA and is saved with the adapter.

    Args:
        model: Base model, changed in place.
        config: LoRA and posterior settings.

    Raises:
        BlobError: config is not a `BlobConfig`, or its target_modules match nothing.
    """
    if not isinstance(config, BlobConfig):
        raise BlobError(f"get_blob_model needs a BlobConfig, got {type(config).__name__}")
    return bayesianize(_wrap(model, config, adapter_name), config, adapter_name)


def get_lora_model(model: PreTrainedModel, config: LoraConfig, adapter_name: str = "default") -> BlobModel:
    """A plain LoRA model with all else as in `get_blob_model`, the head's treatment and saving included.

    For comparing BLoB with LoRA. It has no posterior until `bayesianize`.
    """
    return _wrap(model, config, adapter_name)


def bayesianize(peft_model: PeftModel, config: BlobConfig | None = None, adapter_name: str | None = None) -> BlobModel:
    """Turn a (trained) plain LoRA adapter into a posterior around it, in place.

    The adapter's A becomes the posterior mean, B and every LoRA setting stay; of `config` only the posterior's
    fields are used (`prior_std`, `init_eps`, `std_parameterization`, `noise`).

    Args:
        peft_model: From `get_peft_model` or `PeftModel.from_pretrained(..., is_trainable=True)`.
        config: Posterior settings, default `BlobConfig()`.
        adapter_name: Default: the active adapter.

    Returns:
        The same object, now a `BlobModel`.

    Raises:
        BlobError: Not a PEFT model, or the adapter is not plain LoRA on linear layers.
    """
    if not isinstance(peft_model, PeftModel):
        raise BlobError(f"bayesianize needs a PeftModel with a LoRA adapter, got {type(peft_model).__name__}")
    adapter = adapter_name or peft_model.active_adapter
    if adapter not in peft_model.peft_config:
        raise BlobError(f"no adapter named {adapter!r}; this model has {', '.join(peft_model.peft_config)}")
    lora: Any = peft_model.peft_config[adapter]
    if lora.peft_type != PeftType.LORA:
        raise BlobError(f"bayesianize needs a LoRA adapter, but {adapter!r} is {lora.peft_type.value}")
    blob_config = BlobConfig.from_lora(lora, config)
    posterior.attach_posterior(peft_model, blob_config, adapter)
    peft_model.peft_config[adapter] = blob_config
    return as_blob_model(peft_model)


def load_lora(base: PreTrainedModel, folder: str | os.PathLike[str], is_trainable: bool = False) -> BlobModel:
    """Load a plain LoRA adapter as what it is: `BlobModel.from_pretrained` would give it a posterior."""
    config = LoraConfig.from_pretrained(os.fspath(folder))
    config.inference_mode = not is_trainable
    model = _wrap(base, config, "default")
    model.load_adapter(folder, "default", is_trainable=is_trainable)
    return model


def as_blob_model(peft_model: PeftModel) -> BlobModel:
    """Give a PEFT model our saving and loading, in place; it has no posterior by that."""
    if not isinstance(peft_model, BlobModel):
        peft_model.__class__ = _BLOB_CLASSES[type(peft_model)]
    assert isinstance(peft_model, BlobModel)
    peft_model._remember_head()
    return peft_model


def _wrap(model: PreTrainedModel, config: LoraConfig, adapter_name: str) -> BlobModel:
    if targets_head(model, config):
        config.task_type = None
    try:
        peft_model = get_peft_model(model, config, adapter_name)
    except ValueError as error:
        if "arget modules" not in str(error) and "modules were targeted" not in str(error):
            raise
        raise BlobError(
            f"target_modules {config.target_modules!r} match no layer of {type(model).__name__}; "
            f"it has, for example, {', '.join(_linear_names(model))} (or use 'all-linear')"
        ) from error
    return as_blob_model(peft_model)


def _linear_names(model: nn.Module, count: int = 8) -> list[str]:
    names = (name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return list(dict.fromkeys(names))[:count]
