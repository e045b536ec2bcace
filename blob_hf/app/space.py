"""A Space for the Hugging Face Hub with the page of an adapter: `blob app ADAPTER --space DIR`.

It holds all that it needs and that is not in a package index or on the Hub: the package's own source, and a local
adapter with its local base model.
"""

import json
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from packaging.requirements import Requirement

import blob_hf
from blob_hf.app import require_gradio
from blob_hf.app.beside import CLASS_FILES, PAGE_SETTINGS, PREDICTIONS, RESULT_FILES
from blob_hf.app.engine import check_adapter
from blob_hf.cli.folders import SETTINGS_FILE, run_settings
from blob_hf.tuner.adapter_files import CHAT_TEMPLATES, NAMES, TOKENIZER_FILES, read_config, resolve
from blob_hf.tuner.registry import companion_files
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

_BESIDE = (*CLASS_FILES.values(), *RESULT_FILES.values())
_BASE_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.jsonl", "backbone")
_APP = Template('''"""The page of an adapter; made by `blob app --space`."""

import os
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from blob_hf.app.serving import adapter_part, blocks, serve

HERE = Path(__file__).resolve().parent
on_hub = "SPACE_ID" in os.environ  # there the page is shown inside another one, and for all
part = adapter_part($adapter$prompt)
demo = blocks([part], $title)

if __name__ == "__main__":
    port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    serve(demo, host="0.0.0.0" if on_hub else "127.0.0.1", port=port, own_alone=not on_hub)
''')
_README = Template("""---
$metadata---

# $title

$about Shown by [blob_hf](https://arxiv.org/abs/2406.11675), whose source is in `blob_hf/`.
`python app.py` starts it on this machine.
""")


def write_space(adapter: str, folder: Path, prompt: str | None = None) -> list[str]:
    """Write app.py, requirements.txt, README.md and what they need into a folder.

    Args:
        adapter: Folder or Hub repo; a folder's adapter is copied.
        folder: New or empty.
        prompt: Of a summarizer.

    Returns:
        Files in it that hold texts of the evaluation set.

    Raises:
        BlobError: The folder has files, the adapter cannot be found or has no page, its base model is neither here nor
            on the Hub, or the package is not installed. Nothing is written then.
    """
    require_gradio()
    if (folder.is_dir() and any(folder.iterdir())) or folder.is_file():
        raise BlobError(f"{folder} is not empty; give a new folder for the Space")
    source = resolve(adapter)
    local = Path(adapter).is_dir()
    base = str(read_config(source).base_model_name_or_path or "")
    check_adapter(adapter, source, prompt)
    _check_base(source, base)
    settings, needed = run_settings(source) if local else {}, requirements()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if local:
            _copy_adapter(source, folder / "adapter", base, settings)
        shutil.copytree(Path(blob_hf.__file__).parent, folder / "blob_hf", ignore=_LEFT_OUT)
    except OSError as error:
        raise BlobError(f"cannot write to {folder} ({error.strerror or error}); choose another folder") from error
    name = source.resolve().name if local else adapter
    title = f"{name}: how sure is it?"
    app = _APP.substitute(
        title=repr(title), adapter='HERE / "adapter"' if local else repr(adapter),
        prompt="" if prompt is None else f", prompt={prompt!r}",
    )  # fmt: skip
    files.write_text(folder / "app.py", app)
    files.write_text(folder / "requirements.txt", "\n".join(needed) + "\n")
    files.write_text(folder / "README.md", _readme(title, adapter, base, local))
    return [str(path.relative_to(folder)) for path in sorted(folder.glob(f"adapter/*{PREDICTIONS}"))]


def requirements() -> list[str]:
    """What the page needs: the package's own requirements at the versions that are installed here.

    Raises:
        BlobError: The package is not installed.
    """
    import gradio

    try:
        declared = [Requirement(line) for line in metadata.requires("blob_hf") or []]
    except metadata.PackageNotFoundError as error:
        raise BlobError("what blob_hf needs is not known, because it is not installed: pip install .") from error
    names = [one.name for one in declared if one.marker is None]
    return [f"gradio=={gradio.__version__}", *(f"{name}=={_public(metadata.version(name))}" for name in names)]


def _public(version: str) -> str:
    """A version as package indexes have it: without what a local build adds."""
    return version.partition("+")[0]


def _check_base(source: Path, base: str) -> None:
    """Refuse an adapter whose base model a Space could not load."""
    if (source / "base_model").is_dir() or Path(base).is_dir():
        return
    try:
        validate_repo_id(base)
    except HFValidationError as error:
        raise BlobError(
            f"the base model {base!r} of {source} is neither a folder here nor a name on the Hub: no Space can load it"
        ) from error


def _copy_adapter(source: Path, target: Path, base: str, settings: dict[str, Any]) -> None:
    names = (*NAMES, *companion_files(), *TOKENIZER_FILES, *CHAT_TEMPLATES, *_BESIDE)
    _copy(source, target, names)
    _copy(source, target, [f"base_model/{name}" for name in _BASE_FILES])
    if Path(base).is_dir() and not (target / "base_model").exists():
        _copy(Path(base), target / "base_model", _BASE_FILES)
    kept = {name: settings[name] for name in PAGE_SETTINGS if name in settings}
    if kept:  # what the page reads, without paths of this machine
        files.write_text(target / SETTINGS_FILE, json.dumps(kept) + "\n")
    if (target / "base_model").exists():
        _forget_path(target / "adapter_config.json")


def _forget_path(config: Path) -> None:
    """The base model is beside the adapter: its old path would be taken first where it exists."""
    read = json.loads(config.read_text(encoding="utf-8"))
    read["base_model_name_or_path"] = "base_model"
    files.write_text(config, json.dumps(read, indent=2) + "\n")


def _copy(source: Path, target: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def _readme(title: str, adapter: str, base: str, local: bool) -> str:
    import gradio

    models = [name for name in ("" if local else adapter, base) if name and not Path(name).is_dir()]
    facts = {
        "title": title, "emoji": "🎲", "colorFrom": "blue", "colorTo": "yellow", "sdk": "gradio",
        "sdk_version": gradio.__version__, "python_version": "3.11", "app_file": "app.py", "pinned": False,
        **({"models": models} if models else {}), "tags": ["blob", "uncertainty", "lora"],
    }  # fmt: skip
    about = "What sampled networks of a Bayesian LoRA adapter answer, and how sure they are of it."
    return _README.substitute(
        metadata=yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), title=title, about=about
    )
