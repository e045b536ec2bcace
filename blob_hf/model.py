"""`BlobModel`: a `PeftModel` whose LoRA adapters carry a Gaussian posterior over A. Build, save and load it here."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
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
    get_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from blob_hf import adapter_files, posterior
from blob_hf.base_model import has_task_head, head_parameters, load_base_model, targets_head
from blob_hf.config import BlobConfig
from blob_hf.errors import BlobError
from blob_hf.layer import gathered, std_from_rho

_RHO = ".rho"  # GaussianA keeps rho next to lora_A's weight
_MEAN = ".weight"


class BlobModel(PeftModel):
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

    def posterior_samples(self, num_samples: int, seed: int = 0, first: int = 0) -> AbstractContextManager[None]:
        """Context in which the network is `num_samples` frozen posterior samples over sample-major rows.

        See `blob_hf.posterior.posterior_samples`.
        """
        return posterior.posterior_samples(self, num_samples, seed, first)

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

    def create_or_update_model_card(self, output_dir: str) -> None:
        """PEFT's template card, unless the folder has a card already: that one was written from a run."""
        if not os.path.isfile(os.path.join(output_dir, "README.md")):
            super().create_or_update_model_card(output_dir)

    # ----- saving ------------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapter_config.json, adapter_model.safetensors (the posterior mean) and posterior_std.safetensors.

        The mean is an ordinary LoRA adapter that plain PEFT loads. A classification head that LoRA is attached to
        is frozen at random values no Hub checkpoint has, so its weights are stored along, where PEFT finds them
        (`...base_layer.weight`). An `lm_head` among the targets is *not*: "auto" saves no embedding layers.

        Args:
            save_directory: Folder, made if needed; adapters not named "default" go into subfolders of it.
            state_dict: Gathered weights (the Trainer passes them under DeepSpeed and FSDP).

        Raises:
            BlobError: safe_serialization is off, or the weights are shards that were not gathered.
        """
        if not safe_serialization:
            raise BlobError("safe_serialization=False writes pickles, which blob_hf refuses; leave it on")
        save_embeddings: Any = False if save_embedding_layers == "auto" else save_embedding_layers
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            self.create_or_update_model_card(str(save_directory))
        for adapter in selected_adapters or list(self.peft_config):
            weights = get_peft_model_state_dict(self, state_dict, adapter, save_embedding_layers=save_embeddings)
            if not is_main_process:
                continue
            folder = Path(save_directory) / ("" if adapter == "default" else adapter)
            config: Any = self.peft_config[adapter]
            rhos = {name.removesuffix(_RHO) + _MEAN: weights.pop(name) for name in list(weights) if name.endswith(_RHO)}
            adapter_files.write(
                folder,
                mean={**self._frozen_head(state_dict), **weights},
                std={name: std_from_rho(rho.float(), config.std_parameterization) for name, rho in rhos.items()},
            )
            self._save_config(config, folder)

    def _save_config(self, config: Any, folder: Path) -> None:
        base: Any = self.get_base_model()
        mapping: dict[str, Any] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        # AutoPeftModel ignores the rest; our from_pretrained does not
        mapping["dtype"] = str(base.dtype).removeprefix("torch.")
        if has_task_head(base):
            mapping["num_labels"] = base.config.num_labels
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(base, "name_or_path", None)
        inference_mode, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(str(folder), auto_mapping_dict=mapping)
        finally:
            config.inference_mode = inference_mode

    def _frozen_head(self, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor]:
        head = {}
        for name, parameter in head_parameters(self).items():
            if state_dict is not None and name in state_dict:
                head[name] = state_dict[name]
            elif hasattr(parameter, "ds_id"):  # only this rank is saving, so it cannot gather
                head[name] = self._head_snapshot[name]
            else:
                head[name] = parameter.detach()
        return head

    def _remember_head(self) -> None:
        """Keep a copy of the frozen head where ZeRO-3 will shard it (all ranks come here, one of them saves)."""
        parameters = head_parameters(self)
        with gathered(list(parameters.values())):
            self._head_snapshot = {name: value.detach().cpu().clone() for name, value in parameters.items()}

    # ----- loading -----------------------------------------------------------------------------------------------

    def load_adapter(  # type: ignore[override]
        self, model_id: Any, adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """Load a BLoB or plain LoRA adapter into this model: PEFT's `load_adapter`, then the posterior std.

        A plain LoRA adapter gets the stds of a fresh `BlobConfig`, and a warning says so.

        Raises:
            BlobError: std file missing from a BLoB adapter, or not matching the mean (names, shapes, values).
        """
        hub = {key: kwargs[key] for key in ("revision", "subfolder", "token", "cache_dir") if kwargs.get(key)}
        if adapter_name not in self.peft_config:
            config = BlobConfig.from_pretrained(str(model_id), **hub)
            config.inference_mode = not is_trainable
            self.add_adapter(adapter_name, config)
            if is_trainable:
                self.set_requires_grad(adapter_name)
        result = super().load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        result.missing_keys[:] = [key for key in result.missing_keys if not key.endswith(_RHO)]
        layers = {
            f"base_model.model.{name}.lora_A.weight": layer
            for name, layer in posterior.gaussian_layers(self, adapter_name).items()
        }
        if layers:
            adapter_files.load_std(str(model_id), layers, **hub)
        self._remember_head()
        return result

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path_or_repo: str | os.PathLike[str],
        model: PreTrainedModel | None = None,
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
        **base_kwargs: Any,
    ) -> "BlobModel":
        """Load an adapter folder or Hub repo, finding the base model and the task class by itself.

        Args:
            path_or_repo: Folder or Hub repo of a BLoB adapter, or of a plain LoRA adapter (which gets fresh stds).
            model: The base model, if you have it already; found through adapter_config.json otherwise.
            is_trainable: Load for further training.
            base_kwargs: Passed to the base model's `from_pretrained` (`dtype`, `device_map`, `num_labels` ...).

        Returns:
            The model in eval mode (train mode settings are up to you when is_trainable).

        Raises:
            BlobError: Not an adapter, or its base model cannot be found.
        """
        hub = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
        hub = {key: value for key, value in hub.items() if value is not None}
        path = os.fspath(path_or_repo)
        try:
            config = BlobConfig.from_pretrained(path, **hub)
        except BlobError:
            raise
        except ValueError as error:
            raise BlobError(f"{error}; expected a folder or Hub repo with a (B)LoRA adapter") from error
        config.inference_mode = not is_trainable
        if model is None:
            model = load_base_model(path, config, token, base_kwargs)
        blob_model = bayesianize(_wrap(model, config, adapter_name), config, adapter_name)
        blob_model.load_adapter(path, adapter_name, is_trainable=is_trainable, **hub)
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
