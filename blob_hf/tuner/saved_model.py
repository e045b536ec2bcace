"""The files of a `PeftModel` with a posterior: what is saved, loaded and pushed, and what adapters take along."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from blob_hf.tuner import adapter_files, load_checks, loading
from blob_hf.tuner.adapter_files import SavedAdapter
from blob_hf.tuner.base_model import load_base_model
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.registry import VERBS, Companion, companion_files
from blob_hf.utils import files, hub
from blob_hf.utils.errors import BlobError

if TYPE_CHECKING:
    from blob_hf.tuner.model import BlobModel

_KEY_MAPPING = "_checkpoint_conversion_mapping"  # models not of transformers' own may have it; PEFT looks there, too


class SavedModel(PeftModel):
    """A `PeftModel` that saves and loads adapters with their stds and companions, whole or not at all.

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

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.companions, self.adapter_heads, self.folders, self.tokenizers = {}, {}, {}, {}
        self.remember_head()

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
        load_checks.refuse_unknown("save_pretrained", {key: kwargs[key] for key in kwargs if key not in harmless})
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
                    companion.save(cast("BlobModel", self), folder)
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
            VERBS.write_card(cast("BlobModel", self), Path(output_dir))

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
        load_checks.check_name(adapter_name)
        load_checks.refuse_unknown("load_adapter", {"ephemeral_gpu_offload": ephemeral_gpu_offload, **kwargs})
        saved = adapter_files.read(adapter_files.resolve(model_id, revision, subfolder, token, cache_dir))
        saved = loading.with_key_mapping(saved, key_mapping)
        new = adapter_name not in self.peft_config
        if not new and loading.is_merged(self):
            raise BlobError(f"adapter {adapter_name!r} is merged into the base weights: unmerge_adapter() first")
        if not new:
            own: Any = self.peft_config[adapter_name]
            load_checks.check_scaling(own, saved, adapter_name)
        load_checks.check_memory(saved.config, low_cpu_mem_usage)
        if new:
            load_checks.check_companions(saved)
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
        load_checks.check_fits(self, named, adapter)
        if shares:
            load_checks.check_shares(self, named, adapter)
        saved = replace(saved, std=named.std)  # PEFT converts the names of the mean itself
        result = loading.fill(self, saved, adapter, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage)
        for companion in self.companions.get(adapter, {}).values():
            companion.refill(cast("BlobModel", self), saved.folder)
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
        from blob_hf.tuner.build import bayesianize, get_lora_model  # which make models of these classes

        if isinstance(path_or_repo, nn.Module):
            path_or_repo, model = model, path_or_repo  # type: ignore[assignment]
        source, model = load_checks.checked_arguments(path_or_repo, model, config, base_kwargs)
        load_checks.check_name(adapter_name)
        load_checks.refuse_unknown("from_pretrained", {"ephemeral_gpu_offload": ephemeral_gpu_offload})
        saved = adapter_files.read(adapter_files.resolve(source, revision, subfolder, token, cache_dir))
        own = saved.config
        if not isinstance(own, BlobConfig) and not saved.companions:
            own = BlobConfig.from_lora(own, config)
        own.inference_mode = not is_trainable
        load_checks.check_memory(own, low_cpu_mem_usage)
        given = model is not None
        if model is None:
            model = load_base_model(saved.folder, own, token, base_kwargs)
        saved = loading.with_key_mapping(saved, key_mapping or getattr(model, _KEY_MAPPING, None))
        if given:
            load_checks.check_vocabulary(model, saved)
        else:
            loading.resize_vocabulary(model, saved)
        memory = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
        blob_model = get_lora_model(model, own, adapter_name, **memory)  # type: ignore[arg-type]
        if isinstance(own, BlobConfig):
            blob_model = bayesianize(blob_model, own, adapter_name)
        blob_model._fill(saved, adapter_name, is_trainable, **memory)
        for companion in saved.companions:
            blob_model.set_companion(companion)
            companion.attach(blob_model, saved.folder)
        return blob_model
