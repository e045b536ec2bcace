"""The names of a classifier's classes are saved with its adapter and come back with it."""

import copy
import json

import pytest
from helpers.models import TARGETS, tiny_bert
from peft import AutoPeftModel, LoraConfig, PeftModel

from blob_hf import BlobConfig, BlobModel, get_blob_model, get_lora_model
from blob_hf.baselines import attach_mc_dropout
from blob_hf.tuner.base_model import class_names, name_classes
from blob_hf.tuner.build import load_lora

NAMES = {0: "no", 1: "maybe", 2: "yes"}
IDS = {"no": 0, "maybe": 1, "yes": 2}


def named_base(folder, names=None):
    base = tiny_bert()
    base.save_pretrained(folder)  # without names, as a pretrained encoder is
    base.name_or_path = base.config._name_or_path = str(folder)
    if names:
        base.config.id2label, base.config.label2id = dict(names), {name: index for index, name in names.items()}
    return base


def names_of(model):
    config = model.get_base_model().config
    return config.id2label, config.label2id


MAKE = {
    "blob": lambda base: get_blob_model(base, BlobConfig(target_modules=TARGETS["bert"])),
    "lora": lambda base: get_lora_model(base, LoraConfig(target_modules=TARGETS["bert"])),
    "mc_dropout": lambda base: attach_mc_dropout(
        get_lora_model(base, LoraConfig(target_modules=TARGETS["bert"], lora_dropout=0.1))
    ),
}


@pytest.mark.parametrize("method", MAKE)
def test_the_names_come_back_whoever_loads_the_base_model(tmp_path, method):
    MAKE[method](named_base(tmp_path / "base", NAMES)).save_pretrained(tmp_path / "adapter")
    assert names_of(BlobModel.from_pretrained(tmp_path / "adapter")) == (NAMES, IDS)
    plain = tiny_bert()
    assert class_names(plain) is None
    assert names_of(BlobModel.from_pretrained(tmp_path / "adapter", model=plain)) == (NAMES, IDS)
    assert names_of(load_lora(tiny_bert(), tmp_path / "adapter")) == (NAMES, IDS)
    model = BlobModel.from_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "again")
    assert names_of(BlobModel.from_pretrained(tmp_path / "again")) == (NAMES, IDS)


def test_names_that_a_base_model_or_a_caller_has_stay(tmp_path, caplog):
    MAKE["lora"](named_base(tmp_path / "base", NAMES)).save_pretrained(tmp_path / "adapter")
    other = {0: "a", 1: "b", 2: "c"}
    kept = BlobModel.from_pretrained(tmp_path / "adapter", model=named_base(tmp_path / "other", other))
    assert names_of(kept)[0] == other and "that stays" in caplog.text
    asked = BlobModel.from_pretrained(tmp_path / "adapter", id2label=other, label2id={"a": 0, "b": 1, "c": 2})
    assert names_of(asked)[0] == other
    # a base that has names on the disk gives way to what the adapter was trained on
    renamed = named_base(tmp_path / "base", other)
    renamed.save_pretrained(tmp_path / "base")
    assert names_of(BlobModel.from_pretrained(tmp_path / "adapter"))[0] == NAMES


def test_without_names_nothing_is_saved(tmp_path):
    MAKE["blob"](named_base(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    assert "id2label" not in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["auto_mapping"]
    named = BlobModel.from_pretrained(tmp_path / "adapter", model=named_base(tmp_path / "named", NAMES))
    assert names_of(named)[0] == NAMES


def test_plain_peft_loads_the_folder_without_a_word(tmp_path, recwarn):
    MAKE["lora"](named_base(tmp_path / "base", NAMES)).save_pretrained(tmp_path / "adapter")
    recwarn.clear()
    PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter")
    AutoPeftModel.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert not [warning for warning in recwarn if "adapter_config" in str(warning.message)]


def test_another_adapter_does_not_rename_the_active_ones_classes(tmp_path):
    first = named_base(tmp_path / "base", NAMES)
    second = copy.deepcopy(first)  # with the same frozen head: another one would be refused
    name_classes(second, ["a", "b", "c"])
    MAKE["blob"](first).save_pretrained(tmp_path / "one")
    MAKE["blob"](second).save_pretrained(tmp_path / "two")
    model = BlobModel.from_pretrained(tmp_path / "one")
    model.load_adapter(tmp_path / "two", "two")
    assert names_of(model)[0] == NAMES
    model.save_pretrained(tmp_path / "both")
    saved = json.loads((tmp_path / "both" / "two" / "adapter_config.json").read_text())["auto_mapping"]["id2label"]
    assert saved == {"0": "a", "1": "b", "2": "c"}
