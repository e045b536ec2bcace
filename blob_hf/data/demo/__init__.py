"""Embedded demo: generated dialogues and replies, and a tiny BART pretrained on such text.

Nothing here needs a network: the files are part of the package (see README.md in this folder).
They are made by `python -m blob_hf.data.demo.make --out DIR`.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

BACKBONE_DIR: Path = _HERE / "backbone"
SUMMARIZATION_FILES: dict[str, Path] = {
    split: _HERE / f"dialogues_{split}.jsonl" for split in ("train", "validation", "test")
}
CLASSIFICATION_FILES: dict[str, Path] = {split: _HERE / f"replies_{split}.jsonl" for split in ("train", "validation")}

__all__ = ["BACKBONE_DIR", "CLASSIFICATION_FILES", "SUMMARIZATION_FILES"]
