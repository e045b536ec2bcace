"""`BlobModel`: a `PeftModel` whose LoRA adapters carry a Gaussian posterior over A. Save and load it here."""

import logging
import os
import tempfile
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from blob_hf.tuner import adapter_files, loading, posterior
from blob_hf.tuner.adapter_files import SavedAdapter
from blob_hf.tuner.base_model import (
    is_sequence_classifier,
    load_base_model,
    untie_adapted_layers,
)
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.injection import remove_layers
from blob_hf.tuner.registry import VERBS, Companion, companion_files
from blob_hf.tuner.repeating import repeated
from blob_hf.tuner.sampled import SampledLinear
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils import files, hub
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

FORWARDS_WITHOUT_KL = 20  # after which a training without a KL is warned of


class BlobModel(PeftModel):
    """A PEFT model with a posterior over the LoRA A matrices; everything a `PeftModel` does, it does.

    In train mode each forward draws noise (`BlobConfig.noise`); in eval mode the model is the posterior mean, unless
    samples are frozen by `posterior_samples`. Subclasses add PEFT's task-specific forward; build one with
    `get_blob_model`, `bayesianize` or `BlobModel.from_pretrained`.

    Attributes:
        companions: What each adapter takes along beside its weights, by adapter and slot.
        adapter_heads: Frozen heads of adapters that do not share the base model's, by adapter and name.
        folders: Where adapters were loaded from, by adapter.
        tokenizers: That `predict` has found, by adapter.
    """

    companions: dict[str, dict[str, Companion]]
    adapter_heads: dict[str, dict[str, Tensor]]
    folders: dict[str, Path]
    tokenizers: dict[str, PreTrainedTokenizerBase]
    _head_snapshot: dict[str, Tensor]
    unregularized_forwards = 0  # training forwards since the KL was last asked for; -1: no more counted

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.companions, self.adapter_heads, self.folders, self.tokenizers = {}, {}, {}, {}
        self.remember_head()

    # ----- the posterior -----------------------------------------------------------------------------------------

    @property
    def blob_config(self) -> BlobConfig:
        """The active adapter's configuration; of several active ones the first one's."""
        configs = [self.peft_config[name] for name in self.active_adapters]
        found = [config for config in configs if isinstance(config, BlobConfig)]
        if not found:
            raise BlobError(f"the active adapter {self.active_adapter!r} has no posterior; bayesianize it first")
        return found[0]

    @property
    def has_posterior(self) -> bool:
        """Whether the active adapters have a Gaussian A."""
        return bool(posterior.gaussian_layers(self))

    def posterior_mean(self) -> AbstractContextManager[None]:
        """Context in which the network is the posterior mean, also in train mode."""
        return posterior.posterior_mean(self)

    def posterior_samples(
        self, sampling: Sampling | int, seed: int | None = None, repeat: bool = False
    ) -> AbstractContextManager[None]:
        """Context in which the network is frozen posterior samples over sample-major rows.

        See `blob_hf.tuner.posterior.posterior_samples`, also for what it cannot know of rows that you repeat.

        Args:
            repeat: Have `model(...)` and `model.generate(...)` repeat every tensor of the batch S times themselves:
                outputs are sample-major, `out.unflatten(0, (S, -1))`.
        """
        return posterior.posterior_samples(self, sampling, seed, repeat)

    def kl_divergence(self) -> Tensor:
        """KL(q || p) of the active adapters, nats (scalar, differentiable)."""
        self.unregularized_forwards = -1
        configs = {name: self.peft_config[name] for name in self.active_adapters}
        parts = [
            posterior.kl_divergence(self, config.prior_std, name)
            for name, config in configs.items()
            if isinstance(config, BlobConfig)
        ]
        return torch.stack(parts).sum() if parts else posterior.kl_divergence(self, self.blob_config.prior_std)

    def posterior_statistics(self) -> posterior.PosteriorStatistics:
        """Std, KL (nats) and signal-to-noise ratio, per layer and in total."""
        return posterior.posterior_statistics(self, self.blob_config.prior_std)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = repeated(self, args, kwargs)
        if self.training and torch.is_grad_enabled() and self.unregularized_forwards >= 0:
            self._count_forward()
        for companion in self.companions.get(str(self.active_adapter), {}).values():
            if companion.asked_by in kwargs:
                return companion.answer(self, super().forward, kwargs)
        return super().forward(*args, **kwargs)

    @property
    def classifies(self) -> bool:
        """Whether what it predicts are classes: of whole texts, or the choices of a question."""
        companions = self.companions.get(str(self.active_adapter), {}).values()
        return is_sequence_classifier(self.get_base_model()) or any(one.asked_by for one in companions)

    def _count_forward(self) -> None:
        """Warn once where a posterior is trained without its KL, by a plain `transformers.Trainer` for example."""
        self.unregularized_forwards += 1
        if self.unregularized_forwards == FORWARDS_WITHOUT_KL:
            self.unregularized_forwards = -1
            if self.has_posterior:
                logger.warning(
                    "%d training steps without the KL of the posterior: this trains LoRA with noise, not BLoB; use "
                    "BlobTrainer (or BlobTrainerMixin with another trainer), or add model.kl_divergence() to the loss",
                    FORWARDS_WITHOUT_KL,
                )

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        is_new = adapter_name not in self.peft_config
        try:
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        except Exception:
            if is_new:
                remove_layers(self, adapter_name)
            raise

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.companions.pop(adapter_name, None)
        self.adapter_heads.pop(adapter_name, None)
        self.folders.pop(adapter_name, None)
        self.tokenizers.pop(adapter_name, None)

    def generate(  # type: ignore[override]
        self, *args: Any, sampling: Sampling | int | None = None, **kwargs: Any
    ) -> Tensor | ModelOutput:
        """transformers' `generate`; with `sampling` a text from each of so many posterior samples.

        Args:
            sampling: S samples: returns `(batch * S, length)`, all samples of input 0 first, as
                `num_return_sequences` orders them: `tokens.unflatten(0, (-1, S))`. None generates with the network as
                it is (in eval mode the mean).

        Raises:
            BlobError: See `blob_hf.inference.generate_posterior`.
        """
        if sampling is None:
            args, kwargs = repeated(self, args, kwargs)
            return super().generate(*args, **kwargs)
        if args:
            kwargs["input_ids"] = args[0]
        return VERBS.required("generate")(self, sampling, **kwargs)

    def predict(
        self,
        inputs: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        sampling: Sampling | int | str = Sampling(),  # noqa: B008
        **options: Any,
    ) -> Any:
        """Labels or texts for new inputs, with what the posterior samples say of their certainty.

        Args:
            inputs: Texts, pairs, conversations; a tokenized batch; a `datasets.Dataset` of any of these.
            tokenizer: Default the one saved with the adapter, else the base model's.
            sampling: S samples, or their number; 0 is the posterior mean; "auto" as many as each input needs.
            options: See `blob_hf.inference.predictor.predict`.

        Returns:
            A `blob_hf.Prediction` of a classifier, a `blob_hf.TextPrediction` of a model that writes.

        Raises:
            BlobError: The inputs are none of these, there is no tokenizer, or the model has another task.
        """
        return VERBS.required("predict")(self, inputs, tokenizer, sampling, **options)

    def predict_proba(
        self,
        inputs: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        sampling: Sampling | int | str = Sampling(),  # noqa: B008
        **options: Any,
    ) -> NDArray[np.float64]:
        """A classifier's probabilities `(inputs, classes)`, as scikit-learn gives them: columns are class ids in order.

        Args: as those of `predict`.

        Raises:
            BlobError: As `predict`, or not a classifier.
        """
        found = self.predict(inputs, tokenizer, sampling, **options)
        if not hasattr(found, "probabilities"):
            raise BlobError(f"predict_proba is for classifiers, not for {type(self.get_base_model()).__name__}")
        return found.probabilities

    # ----- merging -----------------------------------------------------------------------------------------------

    def merge_posterior_sample(self, seed: int = 0, index: int = 0) -> nn.Module:
        """Merge one posterior sample into the base weights, as `merge_and_unload` does the posterior mean.

        Args:
            seed, index: Sample `index` of `posterior_samples(..., seed)`.

        Returns:
            The base model, an ordinary transformers model; the adapter is gone from it.

        Raises:
            BlobError: No posterior, or merged already.
        """
        for layer, sample in posterior.layer_samplings(self, Sampling(1, seed=seed, first=index)).items():
            layer.fix_at_sample(sample)
        return self.merge_and_unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge the posterior mean into the base weights: PEFT's, after untying an `lm_head` that has LoRA."""
        self._refuse_while_sampling()
        untie_adapted_layers(self)
        tuner: Any = self.base_model
        base = tuner.merge_and_unload(*args, **kwargs)
        for path, module in list(base.named_modules()):  # a head whose weights can be sampled
            if isinstance(module, SampledLinear):
                parent, _, name = path.rpartition(".")
                setattr(base.get_submodule(parent), name, module.plain())
        return base

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Merge without unloading: PEFT's, after untying an `lm_head` that has LoRA."""
        self._refuse_while_sampling()
        untie_adapted_layers(self)
        tuner: Any = self.base_model
        tuner.merge_adapter(*args, **kwargs)

    def _refuse_while_sampling(self) -> None:
        if any(isinstance(module, SampledLinear) and module.is_frozen_somewhere for module in self.modules()):
            raise BlobError(
                "inside posterior_samples or posterior_mean the adapter cannot be merged: the samples would be gone; "
                "merge_posterior_sample(seed, index) outside of them merges one"
            )

    # ----- companions --------------------------------------------------------------------------------------------

    def companion(self, slot: str) -> Companion | None:
        """What the active adapter has in a slot."""
        return self.companions.get(str(self.active_adapter), {}).get(slot)

    def set_companion(self, companion: Companion) -> None:
        """Have it saved with the active adapter, in the place of another one in its slot."""
        self.companions.setdefault(str(self.active_adapter), {})[companion.slot] = companion

    @property
    def method(self) -> str:
        """Name of the method that the active adapter is of: "blob", "lora", or that of a baseline."""
        companion = self.companion("method")
        if companion is not None:
            return companion.name
        return "blob" if isinstance(self.active_peft_config, BlobConfig) else "lora"

    # ----- saving ------------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapter_config.json, adapter_model.safetensors (the posterior mean) and posterior_std.safetensors.

        The mean is an ordinary LoRA adapter that plain PEFT loads. A classification head that LoRA is attached to
        is frozen at random values no Hub checkpoint has, so its weights are stored along, where PEFT finds them
        (`...base_layer.weight`). An `lm_head` among the targets is *not*.

        Args:
            save_directory: Folder, made if needed; adapters not named "default" go into subfolders of it.
            selected_adapters: Names of those to save; default all.
            save_embedding_layers: "auto" saves all token embeddings if they were resized; True saves them, False not.
            path_initial_model_for_weight_conversion: Refused (see below).
            state_dict: Gathered weights (the Trainer passes them under DeepSpeed and FSDP).
            kwargs: `save_function` and `max_shard_size`, which other libraries pass, change nothing here.

        Raises:
            BlobError: safe_serialization is off, the weights are shards that were not gathered, an adapter or a
                keyword is not known, or a conversion of PiSSA or OLoRA is asked for: the converted A has rows that
                are fixed, and is no Gaussian.
        """
        if not safe_serialization:
            raise BlobError("safe_serialization=False writes pickles, which blob_hf refuses; leave it on")
        if path_initial_model_for_weight_conversion is not None:
            raise BlobError(
                "path_initial_model_for_weight_conversion: half of a converted A is fixed: no posterior (its KL is "
                "infinite); train with init_lora_weights=True, or save the mean or a sample merged into the base "
                "model (merge_and_unload, merge_posterior_sample)"
            )
        harmless = ("save_function", "max_shard_size")
        loading.refuse_unknown("save_pretrained", {key: kwargs[key] for key in kwargs if key not in harmless})
        for adapter in self._to_save(selected_adapters):
            mean, std = self.adapter_tensors(adapter, state_dict, save_embedding_layers)
            if not is_main_process:
                continue
            target = Path(save_directory) / adapter_files.subfolder(adapter)
            with files.staged(target) as folder:
                adapter_files.write(folder, mean, std)
                config: Any = self.peft_config[adapter]
                loading.save_config(self, config, folder, is_active=adapter in self.active_adapters)
                for companion in self.companions.get(adapter, {}).values():
                    companion.save(self, folder)
                written = [file.name for file in folder.iterdir()]
            adapter_files.remove_stale(target, written)
        if is_main_process:
            self.create_or_update_model_card(str(save_directory))

    def _to_save(self, selected: list[str] | None) -> list[str]:
        if isinstance(selected, str) or set(selected or ()) - self.peft_config.keys():
            raise BlobError(
                f"selected_adapters must be a list of {', '.join(map(repr, self.peft_config))}, got {selected!r}"
            )
        loading.warn_of_changed_base(self.peft_config)
        return list(self.peft_config) if selected is None else selected

    def adapter_tensors(
        self, adapter: str, state_dict: dict[str, Tensor] | None = None, save_embeddings: str | bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What adapter_model.safetensors and posterior_std.safetensors hold."""
        head = self.adapter_heads.get(adapter) or loading.frozen_head(self, self._head_snapshot, state_dict)
        return loading.adapter_tensors(self, adapter, head, state_dict, save_embeddings)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """A card with what the adapter itself tells, unless the folder has one already: that was written from a run."""
        if VERBS.write_card is not None and not os.path.isfile(os.path.join(output_dir, "README.md")):
            VERBS.write_card(self, Path(output_dir))

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload BLoB adapter",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **save_kwargs: Any,
    ) -> str:
        """Upload what `save_pretrained` writes, in one commit; a model card that the repo has already stays.

        Args:
            repo_id: `user/name`, made if needed.
            revision: Branch to commit to, made if needed.
            save_kwargs: Passed to `save_pretrained`.

        Returns:
            Address of the commit.

        Raises:
            BlobError: It failed; nothing was committed.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_kwargs)
            return hub.push(
                folder, repo_id, commit_message, private, token, revision, create_pr,
                keep=["README.md"], replace=(*adapter_files.NAMES, *companion_files()),
            )  # fmt: skip

    # ----- loading -----------------------------------------------------------------------------------------------

    def load_adapter(  # type: ignore[override]
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        torch_device: str | None = None,
        key_mapping: dict[str, str] | None = None,
        ephemeral_gpu_offload: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a BLoB or plain LoRA adapter into this model, as PEFT's `load_adapter` does.

        A plain LoRA adapter gets the stds of a fresh `BlobConfig`, and a warning says so. All files are fetched and
        checked before the model is touched.

        Args:
            model_id: Folder or Hub repo.
            adapter_name: An adapter of this model, or the name of a new one.
            autocast_adapter_dtype, low_cpu_mem_usage, torch_device, key_mapping, ephemeral_gpu_offload: As in
                `from_pretrained`.

        Returns:
            PEFT's missing and unexpected keys.

        Raises:
            BlobError: Files missing, damaged or not fitting this model or one another; a keyword that is not known;
                the adapter brings another frozen head than those of this model share, or is of a method that changes
                more than its own weights.
        """
        loading.check_name(adapter_name)
        loading.refuse_unknown("load_adapter", {"ephemeral_gpu_offload": ephemeral_gpu_offload, **kwargs})
        saved = adapter_files.read(adapter_files.resolve(model_id, revision, subfolder, token, cache_dir))
        saved = loading.with_key_mapping(saved, key_mapping)
        new = adapter_name not in self.peft_config
        if not new and loading.is_merged(self):
            raise BlobError(f"adapter {adapter_name!r} is merged into the base weights: unmerge_adapter() first")
        if not new:
            own: Any = self.peft_config[adapter_name]
            loading.check_scaling(own, saved, adapter_name)
        loading.check_memory(saved.config, low_cpu_mem_usage)
        if new:
            loading.check_companions(saved)
            config = saved.config
            if not isinstance(config, BlobConfig) and not saved.companions:
                config = BlobConfig.from_lora(config)
            config.inference_mode = not is_trainable
            kwargs = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
            self.add_adapter(adapter_name, config, **kwargs)
            if is_trainable:
                self.set_requires_grad(adapter_name)
            loading.warn_of_changed_base(self.peft_config)
        try:
            result = self._fill(
                saved, adapter_name, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage, shares=new
            )
        except (BlobError, RuntimeError):
            if new:
                self.delete_adapter(adapter_name)
            raise
        if new and saved.companions:
            self.companions[adapter_name] = {companion.slot: companion for companion in saved.companions}
        return result

    def _fill(
        self,
        saved: SavedAdapter,
        adapter: str,
        is_trainable: bool,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        shares: bool = False,
    ) -> Any:
        named = loading.as_named_here(self, saved, adapter)
        loading.check_fits(self, named, adapter)
        if shares:
            loading.check_shares(self, named, adapter)
        saved = replace(saved, std=named.std)  # PEFT converts the names of the mean itself
        result = loading.fill(self, saved, adapter, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage)
        for companion in self.companions.get(adapter, {}).values():
            companion.refill(self, saved.folder)
        if adapter == self.active_adapter:
            loading.restore_class_names(self, saved)
        self.remember_head()
        self.folders[adapter] = saved.folder
        self.tokenizers.pop(adapter, None)
        if not is_trainable:
            self.eval()
        return result

    def remember_head(self) -> None:
        """Keep a copy of the frozen head where ZeRO-3 will shard it (all ranks come here, one of them saves)."""
        self._head_snapshot = loading.snapshot_head(self)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path_or_repo: str | os.PathLike[str] | nn.Module,
        model: nn.Module | str | os.PathLike[str] | None = None,
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        config: BlobConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        torch_device: str | None = None,
        key_mapping: dict[str, str] | None = None,
        ephemeral_gpu_offload: bool = False,
        **base_kwargs: Any,
    ) -> "BlobModel":
        """Load an adapter folder or Hub repo, finding the base model and the task class by itself.

        Args:
            path_or_repo: Folder or Hub repo of a BLoB adapter, of another method's (method.json names it), or of a
                plain LoRA adapter, which gets fresh stds.
            model: The base model, if you have it already; found through adapter_config.json otherwise. PEFT's order,
                the base model first, is understood, too.
            is_trainable: Load for further training.
            revision: Branch, tag or commit of the repo; all files are of this one commit.
            subfolder: Where in the folder or repo the adapter is.
            token: For a private repo; default is that of `hf auth login`.
            config: Posterior settings (`prior_std`, `init_eps` ...) for a plain LoRA adapter; a BLoB adapter has its
                own.
            autocast_adapter_dtype: Keep LoRA's weights in float32 on a half-precision base; False takes the base's
                type for the means (the stds stay float32).
            low_cpu_mem_usage: Make the adapter's weights without memory, and take the loaded ones as they are.
            torch_device: Taken for PEFT's sake: files are read on the CPU, weights go to their layer's device.
            key_mapping: Patterns to replace in the names of the adapter's tensors (without "base_model.model.").
            ephemeral_gpu_offload: Refused: it is for DoRA.
            base_kwargs: Passed to the base model's `from_pretrained` (`dtype`, `device_map`, `num_labels` ...).

        Returns:
            The model in eval mode (train mode settings are up to you when is_trainable).

        Raises:
            BlobError: Not an adapter, damaged, of another base model, or its base model cannot be found; a keyword
                that is for neither.
        """
        from blob_hf.tuner.build import bayesianize, get_lora_model  # which make models of this class

        if isinstance(path_or_repo, nn.Module):
            path_or_repo, model = model, path_or_repo  # type: ignore[assignment]
        if not isinstance(path_or_repo, (str, os.PathLike)) or isinstance(model, (str, os.PathLike)):
            raise BlobError(f"from_pretrained needs the folder or Hub repo of an adapter, got {path_or_repo!r}")
        if isinstance(model, PeftModel):
            raise BlobError("model= has adapters already: give its base model, or call its load_adapter(path, name)")
        if config is not None and not isinstance(config, BlobConfig):
            raise BlobError(f"config= is for the posterior's settings, a BlobConfig; got {type(config).__name__}")
        loading.check_name(adapter_name)
        loading.refuse_unknown("from_pretrained", {"ephemeral_gpu_offload": ephemeral_gpu_offload})
        if model is not None:
            loading.refuse_unknown("from_pretrained", base_kwargs, "with model= there is no base model to load by it")
        saved = adapter_files.read(adapter_files.resolve(path_or_repo, revision, subfolder, token, cache_dir))
        own = saved.config
        if not isinstance(own, BlobConfig) and not saved.companions:
            own = BlobConfig.from_lora(own, config)
        own.inference_mode = not is_trainable
        loading.check_memory(own, low_cpu_mem_usage)
        if model is None:
            model = load_base_model(saved.folder, own, token, base_kwargs)
            saved = loading.with_key_mapping(saved, key_mapping or getattr(model, _KEY_MAPPING, None))
            loading.resize_vocabulary(model, saved)
        else:
            saved = loading.with_key_mapping(saved, key_mapping or getattr(model, _KEY_MAPPING, None))
            loading.check_vocabulary(model, saved)
        memory = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
        blob_model = get_lora_model(model, own, adapter_name, **memory)  # type: ignore[arg-type]
        if isinstance(own, BlobConfig):
            blob_model = bayesianize(blob_model, own, adapter_name)
        blob_model._fill(saved, adapter_name, is_trainable, **memory)
        for companion in saved.companions:
            blob_model.set_companion(companion)
            companion.attach(blob_model, saved.folder)
        return blob_model


_KEY_MAPPING = "_checkpoint_conversion_mapping"  # models not of transformers' own may have it; PEFT looks there, too
