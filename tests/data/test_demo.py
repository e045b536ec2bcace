"""The embedded demo: complete, reproducible from its seed, and usable without network."""

import json
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from blob_hf.data import demo
from blob_hf.data.demo import make, text

SEED = 0  # the seed README.md names
JSONL = [*demo.SUMMARIZATION_FILES.values(), *demo.CLASSIFICATION_FILES.values()]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.BACKBONE_DIR)


def test_files_are_there_and_small() -> None:
    folder = demo.BACKBONE_DIR.parent
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (demo.BACKBONE_DIR / name).is_file()
    assert all(path.is_file() for path in JSONL)
    shipped = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in shipped) <= 5_000_000


def test_same_seed_makes_the_same_bytes(tmp_path: Path) -> None:
    make.write_text(tmp_path, SEED)
    for path in JSONL:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_splits_of_dialogues() -> None:
    rows = {split: _rows(path) for split, path in demo.SUMMARIZATION_FILES.items()}
    assert {split: len(split_rows) for split, split_rows in rows.items()} == {
        "train": 600, "validation": 60, "test": 120,
    }  # fmt: skip
    for row in (row for split_rows in rows.values() for row in split_rows):
        assert set(row) == {"id", "dialogue", "summary", "topic"}
    dialogues = {split: {row["dialogue"] for row in split_rows} for split, split_rows in rows.items()}
    assert not dialogues["test"] & dialogues["train"]
    assert not dialogues["validation"] & dialogues["train"]
    assert not dialogues["test"] & dialogues["validation"]


def test_three_references_for_every_test_dialogue() -> None:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in _rows(demo.SUMMARIZATION_FILES["test"]):
        groups[row["id"].rsplit("_", 1)[0]].append(row)
    assert len(groups) == 40
    for name, group in groups.items():
        assert [row["id"] for row in group] == [f"{name}_{k}" for k in (1, 2, 3)]
        assert len({row["dialogue"] for row in group}) == 1
        assert len({row["summary"] for row in group}) == 3


def test_open_facts_are_in_the_dialogue_twice_and_in_a_summary_once() -> None:
    rows = [row for path in demo.SUMMARIZATION_FILES.values() for row in _rows(path)]
    undecided = [row for row in rows if row["topic"].endswith(", undecided")]
    # binomial: a quarter of the dialogues, four standard deviations
    assert len(undecided) / len(rows) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 700))
    said_once = 0
    for row in undecided:
        assert any(closing in row["dialogue"] for closing in text.UNDECIDED)
        pairs = [
            (a, b)
            for name in text.OPEN_SLOTS
            for a in text.SLOTS[name]
            for b in text.SLOTS[name]
            if f"{a} or {b}" in row["dialogue"]
        ]
        assert pairs, row["dialogue"]
        said_once += any((a in row["summary"]) != (b in row["summary"]) for a, b in pairs)
    # some wordings of a summary leave the open fact out
    assert said_once / len(undecided) > 0.6


def test_pretraining_has_no_open_facts() -> None:
    stream = text.examples(random.Random(0))
    assert not any("undecided" in next(stream).topic for _ in range(300))


@pytest.mark.parametrize(("split", "count"), [("train", 1000), ("validation", 300)])
def test_replies(split: str, count: int) -> None:
    rows = _rows(demo.CLASSIFICATION_FILES[split])
    assert [row["idx"] for row in rows] == list(range(count))
    assert all(set(row) == {"sentence1", "sentence2", "label", "idx"} for row in rows)
    assert {row["label"] for row in rows} == {0, 1}


def test_labels_of_undecided_replies_follow_their_probability() -> None:
    rows = text.replies(random.Random(1234), 6000)
    undecided = [(reply, chance) for reply, chance in text.REPLIES if 0 < chance < 1]
    assert undecided
    for reply, chance in undecided:
        start = reply.split("{")[0]
        labels = [row["label"] for row in rows if str(row["sentence2"]).startswith(start)]
        # four standard deviations of a share of that many draws: the seed is fixed, and a wrong rate fails
        tolerance = 4 * math.sqrt(chance * (1 - chance) / len(labels))
        assert tolerance < 0.15
        assert sum(map(int, labels)) / len(labels) == pytest.approx(chance, abs=tolerance), reply


def test_tokenizer_restores_text_and_closes_every_row_alike(tokenizer: Any) -> None:
    for row in _rows(demo.SUMMARIZATION_FILES["validation"])[:20]:
        ids = tokenizer(row["dialogue"]).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["dialogue"]
        assert tokenizer.unk_token_id not in ids
    rows = _rows(demo.CLASSIFICATION_FILES["validation"])
    pairs = tokenizer([row["sentence1"] for row in rows], [row["sentence2"] for row in rows]).input_ids
    # BART's classifier reads the last </s> and refuses rows with different numbers of them
    assert {ids.count(tokenizer.eos_token_id) for ids in pairs} == {2}


def test_backbone_loads_in_float32(tokenizer: Any) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(demo.BACKBONE_DIR, dtype=torch.float32)
    for parameter in model.parameters():
        assert parameter.dtype is torch.float32
        assert torch.isfinite(parameter).all()
    assert model.config.vocab_size == len(tokenizer)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_backbone_classifies_pairs(tokenizer: Any) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(demo.BACKBONE_DIR, dtype=torch.float32, num_labels=2)
    batch = tokenizer(["Can you come?"] * 2, ["Yes.", "Sorry, I have to work."], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    assert logits.shape == (2, 2) and torch.isfinite(logits).all()
