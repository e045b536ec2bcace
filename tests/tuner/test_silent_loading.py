"""What saving and loading would do in silence if nobody looked: refused, named, or right."""

import copy
import json
import logging
import warnings

import pytest
import torch
from helpers.adapters import assert_same, blob, inputs_for, logits, one_line, trained
from helpers.models import tiny_bert, tiny_gpt2
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from blob_hf import BlobConfig, BlobModel, attach_mc_dropout, bayesianize, get_blob_model
from blob_hf.baselines import MapState
from blob_hf.tuner.adapter_files import STD_FILE
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.utils.errors import BlobError

MEAN_FILE = "adapter_model.safetensors"


def test_a_second_adapter_with_another_frozen_head_is_refused(tmp_path):
    """Both heads are frozen in the one base model: the first adapter would predict with the second's."""
    model, inputs = trained("bert", tmp_path / "base"), inputs_for("bert")
    model.save_pretrained(tmp_path / "adapter")
    before = logits(model, inputs)
    model.load_adapter(tmp_path / "adapter", "same_head")
    file = tmp_path / "adapter" / "adapter_config.json"
    mean = load_file(tmp_path / "adapter" / MEAN_FILE)
    mean["base_model.model.classifier.base_layer.weight"] += 1
    save_file(mean, tmp_path / "adapter" / MEAN_FILE)
    save_file(load_file(tmp_path / "adapter" / STD_FILE), tmp_path / "adapter" / STD_FILE)
    one_line(
        "default, same_head would predict something else; load it on a base model of its own",
        lambda: model.load_adapter(tmp_path / "adapter", "other_head"),
    )
    assert torch.equal(logits(model, inputs), before) and "other_head" not in model.peft_config
    assert json.loads(file.read_text())["peft_type"] == "LORA"


def test_weights_without_a_place_are_named(tmp_path, caplog):
    model = blob(tiny_bert(), modules_to_save=["classifier"])
    base = copy.deepcopy(model).unload()
    model.save_pretrained(tmp_path)
    mean = load_file(tmp_path / MEAN_FILE)
    extra, needed = "base_model.model.nowhere.weight", "base_model.model.classifier.weight"
    save_file({**mean, extra: torch.ones(2)}, tmp_path / MEAN_FILE)
    save_file(load_file(tmp_path / STD_FILE), tmp_path / STD_FILE)
    with caplog.at_level(logging.WARNING, "blob_hf"):
        BlobModel.from_pretrained(tmp_path, model=copy.deepcopy(base))
    assert "no place, they are ignored: base_model.model.nowhere.weight" in caplog.text
    save_file({name: value for name, value in mean.items() if name != needed}, tmp_path / MEAN_FILE)
    one_line(f"lacks {needed}", lambda: BlobModel.from_pretrained(tmp_path, model=base))


def test_plain_peft_trains_on_from_our_folder(tmp_path):
    model, inputs = trained("gpt2", tmp_path / "base"), inputs_for("gpt2")
    model.save_pretrained(tmp_path / "adapter")
    base = tiny_gpt2().from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the four fields that it does not know
        plain = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
        auto = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    assert any(value.requires_grad for name, value in plain.named_parameters() if "lora_A" in name)
    for one in (plain, auto):
        assert torch.equal(logits(one.eval(), inputs), logits(model, inputs))
    assert_same(bayesianize(plain), bayesianize(plain), inputs)


def test_trained_tokens_beside_an_adapter_without_any(tmp_path):
    model, inputs = blob(tiny_bert(), trainable_token_indices=[4, 5]), inputs_for("bert")
    base = copy.deepcopy(model).unload()
    model.add_adapter("plain", BlobConfig(target_modules=["query"], r=2, init_eps=0.9))
    model.save_pretrained(tmp_path)
    loaded = BlobModel.from_pretrained(tmp_path, model=base)
    result = loaded.load_adapter(tmp_path, "plain", subfolder="plain")
    assert not result.missing_keys and not result.unexpected_keys
    for adapter in ("default", "plain"):
        model.set_adapter(adapter)
        loaded.set_adapter(adapter)
        assert_same(loaded, model, inputs)


def test_merged_weights_are_neither_saved_with_an_adapter_nor_loaded_over(tmp_path):
    model = trained("bert", tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    model.merge_adapter()
    one_line(
        r"merged into base weights that are saved with it.*unmerge_adapter\(\)", lambda: model.save_pretrained(tmp_path)
    )
    one_line("'default' is merged into the base weights", lambda: model.load_adapter(tmp_path / "adapter", "default"))
    without_head = blob(tiny_bert())
    without_head.merge_adapter()
    without_head.save_pretrained(tmp_path / "adapter")


def test_a_posterior_that_lost_a_layer_is_not_saved(tmp_path):
    """As after PEFT's `initialize_lora_eva_weights` with other ranks: the file could not be loaded again."""
    model = blob(tiny_bert())
    layer = model.get_base_model().bert.encoder.layer[1].attention.self.value
    layer.lora_A["default"] = nn.Linear(16, 4, bias=False)
    one_line(
        r"layer.1.attention.self.value.lora_A.weight has no std any more \(1 layers\)",
        lambda: model.save_pretrained(tmp_path),
    )
    bayesianize(model).save_pretrained(tmp_path)


def test_pissa_without_memory_is_refused(tmp_path):
    blob(tiny_bert(), init_lora_weights="pissa").save_pretrained(tmp_path)
    one_line(
        "low_cpu_mem_usage=True leaves out init_lora_weights='pissa'",
        lambda: BlobModel.from_pretrained(tmp_path, model=tiny_bert(), low_cpu_mem_usage=True),
    )


def test_names_that_no_submodule_can_have(tmp_path):
    model = blob(tiny_bert())
    model.save_pretrained(tmp_path)
    for name in ("", "a.b", "keys"):
        one_line("an adapter cannot be called", lambda name=name: model.load_adapter(tmp_path, name))
        one_line("an adapter cannot be", lambda name=name: BlobModel.from_pretrained(tmp_path, adapter_name=name))


def test_what_is_no_base_model_and_no_posterior(tmp_path):
    model = blob(tiny_bert())
    model.save_pretrained(tmp_path)
    one_line("model= has adapters already", lambda: BlobModel.from_pretrained(tmp_path, model=model))
    one_line(
        "a BlobConfig; got LoraConfig",
        lambda: BlobModel.from_pretrained(tmp_path, model=tiny_bert(), config=LoraConfig()),
    )


def test_an_adapter_of_another_method_beside_others_stays_what_it_is(tmp_path):
    """Not a plain LoRA adapter that gets a posterior nobody has trained."""
    point = get_lora_model(tiny_bert(), LoraConfig(target_modules=["query"], lora_dropout=0.1))
    point.set_companion(MapState(0.5))
    point.save_pretrained(tmp_path / "map")
    attach_mc_dropout(point).save_pretrained(tmp_path / "mc_dropout")
    model = blob(tiny_bert())
    model.load_adapter(tmp_path / "map", "map")
    one_line("is of the method 'mc_dropout'", lambda: model.load_adapter(tmp_path / "mc_dropout", "other"))
    assert list(model.peft_config) == ["default", "map"] and not gaussian_layers(model, "map")
    model.set_adapter("map")
    assert model.method == "map"


@pytest.mark.parametrize("change", [{"lora_alpha": 16}, {"use_rslora": True}, {"alpha_pattern": {"query": 4}}])
def test_an_adapter_of_another_scaling_does_not_take_the_place_of_one(change, tmp_path):
    base = tiny_bert()
    other = get_blob_model(copy.deepcopy(base), BlobConfig(target_modules=["query"], **change))
    other.save_pretrained(tmp_path)
    model = get_blob_model(base, BlobConfig(target_modules=["query"]))
    with pytest.raises(BlobError, match=f"has {next(iter(change))}=.*load it under another name"):
        model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "other")
    assert model.peft_config["other"].to_dict()[next(iter(change))] == next(iter(change.values()))
