"""Saving, loading and sharing adapters: the part of `BlobModel` that knows about files and the Hub."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from blob_hf.baselines import METHODS
from blob_hf.reporting.model_card import write_model_card
from blob_hf.reporting.run_summary import MethodCard, RunSummary
from blob_hf.tuner import adapter_files, posterior
from blob_hf.tuner.base_model import has_task_head, head_parameters, peft_loading
from blob_hf.tuner.config import BlobConfig, adapter_settings
from blob_hf.tuner.layer import std_to_save
from blob_hf.utils import files, hub
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import gathered

logger = logging.getLogger(__name__)

_RHO = ".rho"  # GaussianA keeps rho next to lora_A's weight
_MEAN = ".weight"


class SavingMixin(PeftModel):
    """A PEFT model saved as posterior mean and std; without a posterior, as plain LoRA with its frozen head.

    Attributes:
        method_facts: What method.json holds; empty for BLoB and for plain LoRA.
        member_heads: Frozen heads of the members of an ensemble, by adapter and name.
    """

    method_facts: dict[str, Any] = {}
    member_heads: dict[str, dict[str, Tensor]] = {}

    @property
    def method(self) -> str:
        """Name of the method that the active adapter is of, as in `--method`."""
        return self.method_facts.get("method", "blob" if isinstance(self.active_peft_config, BlobConfig) else "lora")

    def create_or_update_model_card(self, output_dir: str) -> None:
        """A card with what the adapter itself tells, unless the folder has one already: that was written from a run."""
        if os.path.isfile(os.path.join(output_dir, "README.md")):
            return
        config: Any = self.active_peft_config
        auto_class, auto_arguments = peft_loading(self)
        method = METHODS[self.method]
        summary = RunSummary(
            base_model=config.base_model_name_or_path or getattr(self.get_base_model(), "name_or_path", ""),
            data=None,
            method=self.method,
            card=MethodCard(method.title, method.about, method.limits, method.citation, method.tags, method.sampled),
            settings=adapter_settings(config, method.variational) | method.settings(self),
            num_samples=len(self.method_facts.get("members", ())) or RunSummary.num_samples,
            auto_class=auto_class,
            auto_arguments=auto_arguments,
        )
        write_model_card(Path(output_dir), summary)

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
        for adapter in selected_adapters or list(self.peft_config):
            mean, std = self.adapter_tensors(adapter, state_dict, save_embeddings)
            if not is_main_process:
                continue
            with files.staged(Path(save_directory) / _subfolder(adapter)) as folder:
                adapter_files.write(folder, mean, std)
                self.save_config(self.peft_config[adapter], folder)
                if adapter == self.active_adapter:
                    METHODS[self.method].save(self, folder)
                written = [file.name for file in folder.iterdir()]
            adapter_files.remove_stale(Path(save_directory) / _subfolder(adapter), written)
        if is_main_process:
            self.create_or_update_model_card(str(save_directory))

    def adapter_tensors(
        self, adapter: str, state_dict: dict[str, Tensor] | None = None, save_embeddings: Any = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What adapter_model.safetensors and posterior_std.safetensors hold."""
        weights = get_peft_model_state_dict(self, state_dict, adapter, save_embedding_layers=save_embeddings)
        rhos = {name.removesuffix(_RHO) + _MEAN: weights.pop(name) for name in list(weights) if name.endswith(_RHO)}
        config: Any = self.peft_config[adapter]
        stds = {name: std_to_save(rho, config.std_parameterization) for name, rho in rhos.items()}
        head = self.member_heads.get(adapter) or self._frozen_head(state_dict)
        return {**head, **weights}, stds

    def save_config(self, config: Any, folder: Path) -> None:
        """adapter_config.json, which also names the class of the base model for `from_pretrained`."""
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

        A plain LoRA adapter gets the stds of a fresh `BlobConfig`, and a warning says so. All files are fetched and
        checked before the model is touched.

        Args:
            kwargs: revision, subfolder, token, cache_dir for a Hub repo; the rest is PEFT's.

        Raises:
            BlobError: Files missing, damaged or not fitting this model or one another.
        """
        where = {name: kwargs.pop(name, None) for name in ("revision", "subfolder", "token", "cache_dir")}
        folder = adapter_files.resolve(model_id, **where)
        tensors = adapter_files.read(folder)
        config = BlobConfig.from_pretrained(str(folder))
        new = adapter_name not in self.peft_config
        if new:
            config.inference_mode = not is_trainable
            self.add_adapter(adapter_name, config)
            if is_trainable:
                self.set_requires_grad(adapter_name)
        try:
            adapter_files.check_fits(tensors.mean, self._shapes(adapter_name), folder, config)
            with gathered(list(head_parameters(self).values()), write=True):
                result = super().load_adapter(str(folder), adapter_name, is_trainable=is_trainable, **kwargs)
        except (BlobError, RuntimeError) as error:
            if new:
                self.delete_adapter(adapter_name)
            if isinstance(error, BlobError) or "size mismatch" not in str(error):
                raise
            what = str(error).splitlines()[-1].strip()
            raise BlobError(f"{folder} does not fit this model: {what}") from error
        result.missing_keys[:] = [key for key in result.missing_keys if not key.endswith(_RHO)]
        self._load_std(adapter_name, tensors.std, folder)
        if missing := head_parameters(self).keys() - tensors.mean.keys():
            logger.warning(
                "%s does not hold the head under its LoRA (%s ...): the head stays as it is in the base model, for a "
                "pretrained encoder that is at random",
                folder,
                min(missing),
            )
        self._remember_head()
        return result

    def _shapes(self, adapter: str) -> dict[str, tuple[int, ...]]:
        """Shapes of what `load_adapter` fills, by the names in adapter_model.safetensors."""
        own = {
            name.replace(f".{adapter}.", "."): parameter
            for name, parameter in self.named_parameters()
            if ".lora_" in name and f".{adapter}." in name and not name.endswith(_RHO)
        }
        every = {**own, **head_parameters(self)}
        return {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in every.items()}

    def _load_std(self, adapter: str, stds: dict[str, Tensor] | None, folder: Path) -> None:
        layers = posterior.gaussian_layers(self, adapter)
        if layers and stds is None:
            logger.warning("%s is a plain LoRA adapter: its posterior std comes from BlobConfig, untrained", folder)
        elif stds is not None:
            for layer in layers.values():
                layer.set_std(stds[layer.weight_name])

    # ----- sharing -----------------------------------------------------------------------------------------------

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
                keep=["README.md"], replace=adapter_files.NAMES,
            )  # fmt: skip


def _subfolder(adapter: str) -> str:
    """Where in a folder of adapters the adapter of this name is: PEFT's layout.

    Raises:
        BlobError: The name would lead out of the folder.
    """
    if adapter in (".", "..") or Path(adapter).name != adapter:
        raise BlobError(f"adapter name {adapter!r} is not a folder name; rename the adapter to save it")
    return "" if adapter == "default" else adapter
