"""The files of an adapter folder or Hub repo: the posterior mean, which is a plain LoRA adapter, and the std.

    adapter_config.json          BlobConfig; plain PEFT reads it as a LoraConfig
    adapter_model.safetensors    the posterior mean: exactly a plain LoRA adapter
    posterior_std.safetensors    Omega of every lora_A, under the same names

and what companions of the adapter add (`registry.Companion`).

safetensors files carry no checksum, so the std file's metadata holds the format version and a digest of the tensors of
both files: a damaged file is found, and so is a std beside the mean of another save.
"""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.layer import std_to_save
from blob_hf.tuner.registry import Companion, companion_files, load_companions
from blob_hf.utils import hub
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

STD_FILE = "posterior_std.safetensors"
NAMES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, STD_FILE)
FORMAT_VERSION = 1
_METADATA = "blob_hf"  # one entry: safetensors writes several in random order, and equal adapters should be equal files
_RHO = ".lora_A.rho"  # what PEFT's and transformers' own save_pretrained write beside the mean, in the same file
TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)
CHAT_TEMPLATES = ("*.jinja", "additional_chat_templates/*.jinja")
_KEPT_BASE = ("base_model/*.json", "base_model/*.safetensors", "base_model/*.txt", "base_model/*.model")


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter's folder holds, read and checked.

    Attributes:
        folder: Where it is.
        config: A `BlobConfig`, or the `LoraConfig` of an adapter without a posterior.
        mean: adapter_model.safetensors.
        std: posterior_std.safetensors; None for an adapter without a posterior.
        companions: What was saved beside.
        key_mapping: By which the names of its tensors were changed after reading.
    """

    folder: Path
    config: LoraConfig
    mean: dict[str, Tensor]
    std: dict[str, Tensor] | None
    companions: list[Companion]
    key_mapping: dict[str, str] | None = None


# ----- writing ---------------------------------------------------------------------------------------------------


def write(folder: Path, mean: Mapping[str, Tensor], std: Mapping[str, Tensor]) -> None:
    """Write the two weight files of an adapter into an existing folder (`files.staged` makes that atomic).

    Args:
        mean: What goes into adapter_model.safetensors, by PEFT's names.
        std: Omega (rank, in_features) for every `...lora_A.weight` of the mean; written only if not empty.

    Raises:
        BlobError: A LoRA weight is empty or not a matrix: a shard that was not gathered.
    """
    for name, tensor in mean.items():
        if ".lora_" in name and name.endswith(".weight") and (tensor.dim() != 2 or tensor.numel() == 0):
            raise BlobError(
                f"refusing to save {name} of shape {tuple(tensor.shape)}: it is a shard that was not gathered "
                "(under ZeRO-3 set stage3_gather_16bit_weights_on_model_save, or save through the Trainer)"
            )
    mean, std = _on_cpu(mean), _on_cpu(std)
    save_file(mean, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    if std:
        facts = {"format": FORMAT_VERSION, "mean_sha256": _digest(mean), "std_sha256": _digest(std)}
        save_file(std, folder / STD_FILE, {_METADATA: json.dumps(facts)})


def write_beside(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a companion's tensors beside the mean that is in the folder already, with the mean's digest."""
    mean, _ = read_tensors(folder / SAFETENSORS_WEIGHTS_NAME)
    facts = {"format": FORMAT_VERSION, "mean_sha256": _digest(mean)}
    save_file(_on_cpu(tensors), folder / name, {_METADATA: json.dumps(facts)})


def remove_stale(folder: Path, written: Sequence[str]) -> None:
    """Remove files that an adapter saved here before had, and the one just written has not."""
    for name in {*NAMES, *companion_files()} - set(written):
        if "/" not in name:  # folders inside are adapters of their own
            (folder / name).unlink(missing_ok=True)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values: the same however a file orders or aligns them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def subfolder(adapter: str) -> str:
    """Where in a folder of adapters the adapter of this name is: PEFT's layout.

    Raises:
        BlobError: The name would lead out of the folder.
    """
    if adapter in (".", "..") or Path(adapter).name != adapter:
        raise BlobError(f"adapter name {adapter!r} is not a folder name; rename the adapter to save it")
    return "" if adapter == "default" else adapter


# ----- finding ---------------------------------------------------------------------------------------------------


def resolve(
    path_or_repo: str | os.PathLike[str],
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> Path:
    """The local folder of an adapter: the folder itself, or the snapshot of one commit of a Hub repo.

    Raises:
        BlobError: Not found, no adapter in it, pickled weights only, or a subfolder that leads out of it.
    """
    path = os.fspath(path_or_repo)
    inside = Path(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise BlobError(f"subfolder must be a path inside {path!r}, got {subfolder!r}")
    if os.path.isfile(path):
        raise BlobError(f"{path} is a file: give the folder that it is in, with all of the adapter's files")
    if os.path.isdir(path):
        folder = Path(path, inside)
    else:
        files = (*NAMES, *companion_files(), *TOKENIZER_FILES, *CHAT_TEMPLATES, *_KEPT_BASE)
        wanted = [str(inside / name) for name in files]
        folder = hub.snapshot(path, wanted, revision, token, cache_dir) / inside
    shown = Path(path, inside)
    if not (folder / CONFIG_NAME).is_file():
        raise BlobError(f"no {CONFIG_NAME} in {shown}: expected a folder or Hub repo with a (B)LoRA adapter")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise BlobError(
            f"no {SAFETENSORS_WEIGHTS_NAME} in {shown}; save the adapter as safetensors (a pickle like {WEIGHTS_NAME} "
            "is refused: it can run code when loaded)"
        )
    return folder


# ----- reading ---------------------------------------------------------------------------------------------------


def read(folder: Path) -> SavedAdapter:
    """Read and check all of an adapter's files, each once; nothing else is touched.

    Raises:
        BlobError: A file is missing, damaged, or written by a newer blob_hf; std and mean do not belong together;
            a mean or std is not finite, or a std negative.
    """
    config = read_config(folder)
    companions = load_companions(folder)
    mean, _ = read_tensors(folder / SAFETENSORS_WEIGHTS_NAME)
    _require_finite(mean, folder / SAFETENSORS_WEIGHTS_NAME)
    file = folder / STD_FILE
    if not isinstance(config, BlobConfig):
        return SavedAdapter(folder, config, mean, None, companions)
    if not file.is_file() and (rhos := [name for name in mean if name.endswith(_RHO)]):
        std = {_mean_of(name): std_to_save(mean.pop(name), config.std_parameterization) for name in rhos}
        _check_std(std, mean, folder / SAFETENSORS_WEIGHTS_NAME, config)
        return SavedAdapter(folder, config, mean, std, companions)
    if not file.is_file():
        raise BlobError(f"{STD_FILE} is missing from the BLoB adapter {folder}; get the complete folder")
    std, metadata = read_tensors(file)
    facts = _facts(metadata, file)
    if facts.get("std_sha256", (digest := _digest(std))) != digest:
        raise BlobError(f"{file} is damaged: its contents do not match their checksum; download or save it again")
    _check_std(std, mean, file, config)
    if facts.get("mean_sha256", (digest := _digest(mean))) != digest:
        raise BlobError(
            f"{folder / SAFETENSORS_WEIGHTS_NAME} is damaged, or not the one that {STD_FILE} was saved with; "
            "download or save both again"
        )
    return SavedAdapter(folder, config, mean, std, companions)


def _mean_of(rho: str) -> str:
    return rho.removesuffix("rho") + "weight"


def read_config(folder: Path) -> LoraConfig:
    """adapter_config.json: a `BlobConfig` if the adapter has a posterior, else a `LoraConfig`.

    Raises:
        BlobError: The file is not JSON, or not of a LoRA adapter.
    """
    try:
        settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BlobError(f"cannot read {folder / CONFIG_NAME}: it is not JSON ({error}); get it again") from error
    config = BlobConfig.from_peft_type(**settings)
    return config if "prior_std" in settings else config.to_lora()


def read_beside(folder: Path, name: str) -> dict[str, Tensor]:
    """Read a companion's tensors.

    Raises:
        BlobError: They cannot be read, or the mean beside them is not the one that they belong to.
    """
    tensors, metadata = read_tensors(folder / name)
    mean, _ = read_tensors(folder / SAFETENSORS_WEIGHTS_NAME)
    if _facts(metadata, folder / name).get("mean_sha256", (digest := _digest(mean))) != digest:
        raise BlobError(f"{folder / SAFETENSORS_WEIGHTS_NAME} is not the one that {name} was fitted to")
    return tensors


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        BlobError: It cannot be read.
    """
    try:
        with safe_open(file, "pt") as handle:
            names = handle.keys()
            return {name: handle.get_tensor(name) for name in names}, handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise BlobError(f"cannot read {file}: {error}; download or save the adapter again") from error


def _facts(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """Our entry in the metadata: the format's version, and the checksums (another tool may have left them out)."""
    try:
        facts = json.loads(metadata.get(_METADATA, "{}"))
        version = int(facts.get("format", FORMAT_VERSION))
    except (ValueError, TypeError, AttributeError) as error:
        raise BlobError(f"{file} is damaged: its metadata cannot be read; download or save it again") from error
    if version > FORMAT_VERSION:
        raise BlobError(
            f"{file} has format version {version}, this blob_hf reads up to {FORMAT_VERSION}; pip install -U blob_hf"
        )
    return facts


def _check_std(std: Mapping[str, Tensor], mean: Mapping[str, Tensor], file: Path, config: BlobConfig) -> None:
    layers = {name for name in mean if name.endswith(".lora_A.weight")}
    odd = sorted(set(std) ^ layers if config.posterior_layers is None else set(std) - layers)
    if odd:
        raise BlobError(f"{file} has stds for other layers than the adapter: {odd[0]} ({len(odd)} differ)")
    for name, value in std.items():
        if value.shape != mean[name].shape:
            raise BlobError(
                f"{file}: {name} has shape {tuple(value.shape)}, but the mean has {tuple(mean[name].shape)}"
            )
        if not (torch.isfinite(value).all() and (value >= 0).all()):
            raise BlobError(f"{file}: {name} is not a standard deviation: it has negative or non-finite entries")


def _require_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise BlobError(f"{file}: {name} has NaN or infinite entries; the adapter is damaged or diverged")


def check_fits(
    found: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    folder: Path,
    config: LoraConfig,
    required: Collection[str] = (),
) -> None:
    """Check that the LoRA weights of an adapter are those that a model has room for, before any is copied.

    Args:
        found: The mean, from `read`.
        shapes: Shape by name of what the model holds.
        config: The adapter's configuration, for the message.
        required: Names that have to be among `found`.

    Raises:
        BlobError: Another base model (layers or widths differ) or another rank.
    """
    base = f"it was made for the base model {config.base_model_name_or_path!r}, r={config.r}"
    odd = sorted({name for name in found if ".lora_" in name} ^ {name for name in shapes if ".lora_" in name})
    if odd:
        raise BlobError(f"{folder} does not fit this model: {odd[0]} ({len(odd)} weights differ); {base}")
    if missing := sorted(set(required) - found.keys()):
        raise BlobError(
            f"{folder} lacks {missing[0]} ({len(missing)} weights), which its configuration says it trained"
        )
    for name in sorted(found.keys() & shapes.keys()):
        has, needs = tuple(found[name].shape), tuple(shapes[name])
        if has == needs:
            continue
        rank = 0 if ".lora_A." in name else 1
        if ".lora_" in name and len(has) == len(needs) == 2 and has[1 - rank] == needs[1 - rank]:
            raise BlobError(
                f"{folder}: {name} has rank {has[rank]}, but the configuration says rank {needs[rank]} (r={config.r}); "
                "mean and configuration are not from the same adapter"
            )
        raise BlobError(f"{folder} does not fit this model: {name} has shape {has}, the model needs {needs}; {base}")
