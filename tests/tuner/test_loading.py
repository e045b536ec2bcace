"""Loading and saving as PEFT does it, or a refusal in one line: names, keywords, vocabularies, initialisations."""

import copy
import logging
import warnings

import pytest
import torch
from helpers.adapters import assert_same, blob, inputs_for, logits, one_line, saved_base
from helpers.models import TARGETS, randomize_b, tiny_bert
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming

from blob_hf import BlobConfig, BlobModel
from blob_hf.tuner.adapter_files import STD_FILE
from blob_hf.tuner.posterior import attach_posterior, gaussian_layers

MEAN_FILE = "adapter_model.safetensors"
NAMES = ("layer", "model", "weight", "lora_A")


# ----- initialisations that change the base model ----------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_come_back_on_the_original_base(init, tmp_path):
    base, inputs = tiny_bert(), inputs_for("bert")
    original = copy.deepcopy(base)
    model = blob(base, init_lora_weights=init)
    model.save_pretrained(tmp_path)
    assert_same(BlobModel.from_pretrained(tmp_path, model=copy.deepcopy(original)), model, inputs)
    plain = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path).eval()
    assert torch.equal(logits(plain, inputs), logits(model, inputs))
    own = base.bert.encoder.layer[0].attention.self.query.base_layer.weight
    assert not torch.allclose(own, original.bert.encoder.layer[0].attention.self.query.weight, atol=0.01)


def test_a_conversion_to_plain_lora_is_refused(tmp_path):
    model = blob(tiny_bert(), init_lora_weights="olora")
    one_line(
        "half of a converted A is fixed.*init_lora_weights=True",
        lambda: model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path)),
    )
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_changes_the_base_beside_another_warns(tmp_path):
    blob(tiny_bert(), init_lora_weights="olora").save_pretrained(tmp_path / "olora")
    model = blob(tiny_bert())
    with pytest.warns(UserWarning, match="'second' has init_lora_weights='olora', which changes the base model's"):
        model.load_adapter(tmp_path / "olora", "second")
    with pytest.warns(UserWarning, match="'second' has init_lora_weights='olora'"):
        model.save_pretrained(tmp_path / "both")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*changes the base model's")
        blob(tiny_bert(), init_lora_weights="olora").save_pretrained(tmp_path / "alone")


# ----- keywords --------------------------------------------------------------------------------------------------


def test_keywords_that_would_do_nothing_are_refused_by_name(tmp_path):
    model = blob(tiny_bert())
    one_line(
        r"save_pretrained does not take saf_serialization=True$",
        lambda: model.save_pretrained(tmp_path, saf_serialization=True),
    )
    one_line("push_to_hub=True: call model.push_to_hub", lambda: model.save_pretrained(tmp_path, push_to_hub=True))
    model.save_pretrained(tmp_path, save_function=torch.save, max_shard_size="1GB", push_to_hub=False)
    load, base = BlobModel.from_pretrained, tiny_bert()
    one_line("does not take dtype='auto': with model=", lambda: load(tmp_path, model=base, dtype="auto"))
    one_line(
        "does not take ephemeral_gpu_offload=True: it is for DoRA", lambda: load(tmp_path, ephemeral_gpu_offload=True)
    )
    one_line(
        "ignore_mismatched_sizes=True: a posterior", lambda: load(tmp_path, model=base, ignore_mismatched_sizes=True)
    )
    one_line(
        "load_adapter does not take ignore_mism",
        lambda: model.load_adapter(tmp_path, "x", ignore_mismatched_sizes=True),
    )
    one_line("load_adapter does not take offload_dir='x'$", lambda: model.load_adapter(tmp_path, "x", offload_dir="x"))
    assert list(model.peft_config) == ["default"]


def test_autocast_and_memory_and_device_are_heard(tmp_path):
    model, inputs = blob(tiny_bert()), inputs_for("bert")
    model.save_pretrained(tmp_path)
    for options in ({}, {"autocast_adapter_dtype": False}, {"low_cpu_mem_usage": True, "torch_device": "cpu"}):
        base = copy.deepcopy(model).unload().bfloat16()
        loaded = BlobModel.from_pretrained(tmp_path, model=base, **options)
        loaded.load_adapter(tmp_path, "second", **options)
        wanted = torch.bfloat16 if options.get("autocast_adapter_dtype") is False else torch.float32
        for adapter in ("default", "second"):
            layers = gaussian_layers(loaded, adapter)
            assert {(layer.weight.dtype, layer.rho.dtype) for layer in layers.values()} == {(wanted, torch.float32)}
            assert all(torch.equal(layer.std, gaussian_layers(model)[name].std) for name, layer in layers.items())
        with loaded.posterior_samples(1, seed=1):
            assert logits(loaded, inputs).isfinite().all()


def test_a_plain_adapter_loaded_without_memory_gets_stds(tmp_path):
    lora = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    lora.save_pretrained(tmp_path)
    loaded = BlobModel.from_pretrained(
        tmp_path, model=tiny_bert(), config=BlobConfig(init_eps=0.4), low_cpu_mem_usage=True
    )
    std = loaded.posterior_statistics().total
    assert 0.07 < std.min_std < std.max_std < 0.17


def test_pefts_order_of_arguments_is_understood(tmp_path):
    model, inputs = blob(tiny_bert()), inputs_for("bert")
    original = copy.deepcopy(model).unload()
    model.save_pretrained(tmp_path)
    assert_same(BlobModel.from_pretrained(original, tmp_path), model, inputs)
    one_line("needs the folder or Hub repo of an adapter", lambda: BlobModel.from_pretrained(original))


def test_what_is_no_adapters_name_or_folder(tmp_path):
    model = blob(tiny_bert())
    for selected in (["other"], "default"):
        one_line(
            "selected_adapters must be a list of 'default'",
            lambda names=selected: model.save_pretrained(tmp_path, selected_adapters=names),
        )
    model.save_pretrained(tmp_path / "none", selected_adapters=[])
    assert not (tmp_path / "none" / MEAN_FILE).exists()
    model.save_pretrained(tmp_path)
    one_line("is a file: give the folder", lambda: BlobModel.from_pretrained(tmp_path / MEAN_FILE))


# ----- vocabularies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.slow), "gpt2"])
def test_a_resized_vocabulary_is_saved_and_comes_back(family, tmp_path, caplog):
    base = saved_base(family, tmp_path / "base")
    base.resize_token_embeddings(65)
    task = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM"}[family]
    model = blob(base, target_modules=TARGETS[family], task_type=task)
    with caplog.at_level(logging.INFO, "blob_hf"):
        model.save_pretrained(tmp_path / "adapter")
    assert "the token embeddings were resized: all of them are saved" in caplog.text
    inputs = {"input_ids": torch.tensor([[5, 64, 62, 61, 2]])}
    assert_same(BlobModel.from_pretrained(tmp_path / "adapter"), model, inputs)
    given = type(base).from_pretrained(tmp_path / "base")
    one_line(
        r"saved with 65 token embeddings, but the base model has 60: call base.resize_token_embeddings\(65\)",
        lambda: BlobModel.from_pretrained(tmp_path / "adapter", model=given),
    )
    given.resize_token_embeddings(65)
    assert_same(BlobModel.from_pretrained(tmp_path / "adapter", model=given), model, inputs)
    again = type(base).from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(65)
    assert torch.equal(
        logits(PeftModel.from_pretrained(again, tmp_path / "adapter").eval(), inputs), logits(model, inputs)
    )


def test_embeddings_are_saved_only_if_asked_for_or_resized(tmp_path):
    model = blob(saved_base("gpt2", tmp_path / "base"), target_modules=["c_attn"])
    found = {}
    for wanted in (True, False, "auto"):
        model.save_pretrained(tmp_path / str(wanted), save_embedding_layers=wanted)
        found[wanted] = {name for name in load_file(tmp_path / str(wanted) / MEAN_FILE) if ".lora_" not in name}
    names = {"base_model.model.transformer.wte.weight", "base_model.model.lm_head.weight"}
    assert found == {True: names, False: set(), "auto": set()}
    one_line(
        "must be True, False or 'auto', got 'always'",
        lambda: model.save_pretrained(tmp_path, save_embedding_layers="always"),
    )


@pytest.mark.parametrize("change", [{"trainable_token_indices": [60, 61]}, {"modules_to_save": ["word_embeddings"]}])
def test_trained_tokens_of_a_resized_vocabulary_come_back(change, tmp_path):
    base = saved_base("bert", tmp_path / "base")
    base.resize_token_embeddings(62)
    model = blob(base, task_type="SEQ_CLS", **change)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "word_embeddings" in name and value.requires_grad:
                value.normal_()
    model.save_pretrained(tmp_path / "adapter")
    assert_same(BlobModel.from_pretrained(tmp_path / "adapter"), model, {"input_ids": torch.tensor([[60, 61, 5]])})


# ----- models that are not transformers' -------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_a_model_of_plain_torch(tmp_path):
    base, x = MLP(), torch.randn(4, 6)
    original = copy.deepcopy(base)
    model = blob(base, target_modules=["first"], modules_to_save=["second"])
    model.save_pretrained(tmp_path)
    loaded = BlobModel.from_pretrained(tmp_path, model=original)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        with loaded.posterior_samples(1, seed=2), model.posterior_samples(1, seed=2):
            assert torch.equal(loaded(x), model(x))
    one_line("does not name its base model; pass it as model=", lambda: BlobModel.from_pretrained(tmp_path))


# ----- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["0", *(pytest.param(s, marks=pytest.mark.slow) for s in NAMES)])
def test_adapters_named_like_a_part_of_the_model(name, tmp_path):
    """PEFT saves the adapter beside it without every layer that has the name in its path."""
    model, inputs = blob(tiny_bert(), modules_to_save=["classifier"]), inputs_for("bert")
    bases = [copy.deepcopy(model).unload() for _ in range(2)]
    model.add_adapter(
        name, BlobConfig(target_modules=["query", "value"], r=2, init_eps=0.5, modules_to_save=["pooler"])
    )
    model.set_adapter(name)
    randomize_b(model)
    model.eval().save_pretrained(tmp_path)
    loaded = BlobModel.from_pretrained(tmp_path, model=bases[0])
    result = loaded.load_adapter(tmp_path, name, subfolder=name)
    assert not result.missing_keys and not result.unexpected_keys
    for adapter in ("default", name):
        model.set_adapter(adapter)
        loaded.set_adapter(adapter)
        assert_same(loaded, model, inputs)
    alone = BlobModel.from_pretrained(tmp_path / name, model=bases[1], adapter_name=name)
    assert_same(alone, model, inputs)
    std = load_file(tmp_path / name / STD_FILE)
    for layer, own in gaussian_layers(model).items():
        assert torch.equal(std[f"base_model.model.{layer}.lora_A.weight"], own.std)


def rewrite(folder, rename):
    for file in (MEAN_FILE, STD_FILE):
        save_file({rename(name): value for name, value in load_file(folder / file).items()}, folder / file)


def test_names_of_an_earlier_transformers(tmp_path, monkeypatch):
    """transformers knows what modules were called in older checkpoints, and PEFT asks it for adapters, too."""
    model, inputs = blob(tiny_bert()), inputs_for("bert")
    bases = [copy.deepcopy(model).unload() for _ in range(2)]
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda name: name.replace("encoder.layer.", "encoder.old_layer."))
    one_line("does not fit this model", lambda: BlobModel.from_pretrained(tmp_path, model=copy.deepcopy(bases[0])))
    mapping = {"encoder.old_layer.": "encoder.layer."}
    assert_same(BlobModel.from_pretrained(tmp_path, model=copy.deepcopy(bases[0]), key_mapping=mapping), model, inputs)
    monkeypatch.setattr(type(bases[0]), "_checkpoint_conversion_mapping", mapping, raising=False)
    assert_same(BlobModel.from_pretrained(tmp_path, model=copy.deepcopy(bases[0])), model, inputs)
    monkeypatch.undo()
    conversion_mapping.get_checkpoint_conversion_mapping("bert")  # fills the table
    renaming = [WeightRenaming(r"encoder\.old_layer\.", "encoder.layer.")]
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "bert", renaming)
    loaded = BlobModel.from_pretrained(tmp_path, model=bases[1])
    assert_same(loaded, model, inputs)
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert_same(loaded, model, inputs)


@pytest.mark.parametrize("parameterization", [pytest.param("square", marks=pytest.mark.slow), "softplus"])
def test_an_adapter_that_plain_peft_saved_with_rho_inside(parameterization, tmp_path):
    model, inputs = blob(tiny_bert(), std_parameterization=parameterization), inputs_for("bert")
    base = copy.deepcopy(model).unload()
    model.save_pretrained(tmp_path)
    mean = load_file(tmp_path / MEAN_FILE)
    for name, layer in gaussian_layers(model).items():
        mean[f"base_model.model.{name}.lora_A.rho"] = layer.rho.detach().clone()
    save_file(mean, tmp_path / MEAN_FILE)
    (tmp_path / STD_FILE).unlink()
    assert_same(BlobModel.from_pretrained(tmp_path, model=copy.deepcopy(base)), model, inputs)
    first = min(name for name in mean if name.endswith("rho"))
    for damage, message in (
        ({first: torch.full_like(mean[first], float("nan"))}, "NaN or infinite"),
        ({first: torch.ones(1, 2)}, r"has shape \(1, 2\)"),
    ):
        save_file({**mean, **damage}, tmp_path / MEAN_FILE)
        one_line(message, lambda: BlobModel.from_pretrained(tmp_path, model=base))
    save_file({name: value for name, value in mean.items() if name != first}, tmp_path / MEAN_FILE)
    one_line("stds for other layers", lambda: BlobModel.from_pretrained(tmp_path, model=base))


def test_an_adapter_that_transformers_saved(tmp_path):
    base, inputs = tiny_bert(), inputs_for("bert")
    original, config = copy.deepcopy(base), BlobConfig(target_modules=["query", "value"], r=4, init_eps=0.9)
    base.add_adapter(config)
    attach_posterior(base, config, "default")
    randomize_b(base)
    base.eval().save_pretrained(tmp_path)
    loaded = BlobModel.from_pretrained(tmp_path, model=original)
    assert torch.equal(logits(loaded, inputs), logits(base, inputs))
    assert all(
        torch.equal(layer.std, gaussian_layers(loaded)[name].std) for name, layer in gaussian_layers(base).items()
    )
