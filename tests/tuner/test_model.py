import copy
import json
import logging
import warnings

import pytest
import torch
from helpers.adapters import TASK, inputs_for, logits, saved_base, trained
from helpers.models import TARGETS, TINY, randomize_b, tiny_bart, tiny_bert
from peft import AutoPeftModel, IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

from blob_hf import BlobConfig, BlobModel, attach_mc_dropout, bayesianize, get_blob_model
from blob_hf.tuner.adapter_files import STD_FILE
from blob_hf.tuner.build import BlobModelForSeq2SeqLM, BlobModelForSequenceClassification, get_lora_model
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError


@pytest.mark.parametrize("family", TINY)
def test_save_and_load_gives_the_same_mean_and_the_same_samples(family, tmp_path):
    model, inputs = trained(family, tmp_path / "base"), inputs_for(family)
    model.save_pretrained(tmp_path / "adapter")
    loaded = BlobModel.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    with model.posterior_samples(1, seed=3), loaded.posterior_samples(1, seed=3):
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert loaded.posterior_statistics() == model.posterior_statistics()


@pytest.mark.parametrize("family", TINY)
def test_plain_peft_loads_the_posterior_mean_bit_for_bit(family, tmp_path):
    model, inputs = trained(family, tmp_path / "base"), inputs_for(family)
    model.save_pretrained(tmp_path / "adapter")
    base = type(model.get_base_model()).from_pretrained(tmp_path / "base").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # plain PEFT does not know the four fields of BlobConfig
        plain = get_peft_model(base, LoraConfig.from_pretrained(tmp_path / "adapter"))
        result = plain.load_adapter(str(tmp_path / "adapter"), "default")
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(logits(plain.eval(), inputs), logits(model, inputs))


def test_auto_peft_model_finds_the_frozen_random_head(tmp_path):
    """The head under LoRA exists in no base checkpoint: it must come with the adapter."""
    model, inputs = trained("roberta", tmp_path / "base"), inputs_for("roberta")
    head = model.get_base_model().classifier.out_proj.base_layer.weight
    head.data.normal_()
    assert type(model) is BlobModel and not head.requires_grad
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoPeftModel.from_pretrained(str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(plain, inputs), logits(model, inputs))


def test_number_of_classes_is_found_again(tmp_path):
    base = tiny_bert(num_labels=5)
    base.bert.save_pretrained(tmp_path / "base")  # a checkpoint without a head, as on the Hub
    model = type(base).from_pretrained(tmp_path / "base", num_labels=5)
    blob = get_blob_model(model, BlobConfig(target_modules=TARGETS["bert"], task_type="SEQ_CLS")).eval()
    blob.save_pretrained(tmp_path / "adapter")
    loaded = BlobModel.from_pretrained(tmp_path / "adapter")
    inputs = inputs_for("bert")
    assert torch.equal(logits(loaded, inputs), logits(blob, inputs)) and logits(loaded, inputs).shape == (3, 5)


def test_a_head_that_lora_does_not_target_is_trained_by_peft(tmp_path):
    blob = get_blob_model(
        saved_base("bert", tmp_path / "base"), BlobConfig(target_modules=["query"], task_type="SEQ_CLS")
    )
    assert type(blob) is BlobModelForSequenceClassification
    head = blob.get_base_model().classifier.modules_to_save["default"].weight
    assert head.requires_grad
    head.data.normal_()
    blob.eval().save_pretrained(tmp_path / "adapter")
    inputs = inputs_for("bert")
    assert torch.equal(logits(BlobModel.from_pretrained(tmp_path / "adapter"), inputs), logits(blob, inputs))


def test_files_hold_the_mean_and_the_std_and_no_language_model_head(tmp_path):
    model = trained("bart", tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    mean = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    std = load_file(tmp_path / "adapter" / STD_FILE)
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in mean)
    assert any("lm_head.lora_A" in key for key in mean)
    assert set(std) == {key for key in mean if "lora_A" in key}
    layers = gaussian_layers(model)
    for key, value in std.items():
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert torch.equal(value, layers[name].std) and torch.equal(mean[key], layers[name].weight)
    with safe_open(tmp_path / "adapter" / STD_FILE, "pt") as file:
        assert json.loads(file.metadata()["blob_hf"])["format"] == 1


def test_plain_lora_is_bayesianized_around_its_trained_weights(tmp_path, caplog):
    base = saved_base("bart", tmp_path / "base")
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM", r=4)).eval()
    randomize_b(lora)
    inputs = inputs_for("bart")
    expected = logits(lora, inputs)
    lora.save_pretrained(tmp_path / "lora")
    blob = bayesianize(lora, BlobConfig(prior_std=0.5, noise="local"))
    assert blob.base_model is lora.base_model and type(blob) is BlobModelForSeq2SeqLM  # of the same modules
    assert (blob.blob_config.prior_std, blob.blob_config.r, blob.blob_config.noise) == (0.5, 4, "local")
    assert torch.equal(logits(blob, inputs), expected)
    assert all(parameter.requires_grad for name, parameter in blob.named_parameters() if name.endswith(".rho"))
    with caplog.at_level(logging.WARNING, "blob_hf"):
        loaded = BlobModel.from_pretrained(tmp_path / "lora")
    assert "plain LoRA" in caplog.text and torch.equal(logits(loaded, inputs), expected)


def test_several_adapters_by_name(tmp_path):
    model, inputs = trained("bart", tmp_path / "base"), inputs_for("bart")
    model.add_adapter("second", BlobConfig(target_modules=["v_proj"], task_type="SEQ_2_SEQ_LM", prior_std=0.3))
    first = logits(model, inputs)
    model.set_adapter("second")
    randomize_b(model)
    second = logits(model.eval(), inputs)
    assert model.blob_config.prior_std == 0.3 and not torch.equal(first, second)
    model.save_pretrained(tmp_path / "both")
    loaded = BlobModel.from_pretrained(tmp_path / "both" / "second")
    assert torch.equal(logits(loaded, inputs), second)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(model.get_base_model(), inputs))


def test_plain_lora_for_comparison_has_no_posterior_and_saves_its_head(tmp_path):
    lora = get_lora_model(
        saved_base("roberta", tmp_path / "base"), LoraConfig(target_modules=TARGETS["roberta"], task_type="SEQ_CLS")
    )
    assert not gaussian_layers(lora)
    lora.save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora" / STD_FILE).exists()
    plain = PeftModel.from_pretrained(type(lora.get_base_model()).from_pretrained(tmp_path / "base"), tmp_path / "lora")
    inputs = inputs_for("roberta")
    assert torch.equal(logits(plain.eval(), inputs), logits(lora.eval(), inputs))
    with pytest.raises(BlobError, match="no posterior"):
        _ = lora.blob_config


def test_targets_that_match_nothing_name_some_that_exist():
    with pytest.raises(BlobError, match=r"match no layer of BartForConditionalGeneration.*k_proj, v_proj, q_proj"):
        get_blob_model(tiny_bart(), BlobConfig(target_modules=["query"]))


@pytest.mark.parametrize(
    "config",
    [PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3), IA3Config(task_type="SEQ_2_SEQ_LM")],
)
def test_bayesianize_refuses_what_is_not_lora(config):
    with pytest.raises(BlobError, match="needs a LoRA adapter, but 'default' is"):
        bayesianize(get_peft_model(tiny_bart(), config))


def test_bayesianize_refuses_a_model_without_peft_and_an_unknown_adapter():
    with pytest.raises(BlobError, match="needs a PeftModel"):
        bayesianize(tiny_bart())
    with pytest.raises(BlobError, match="no adapter named 'x'; this model has default"):
        bayesianize(get_peft_model(tiny_bart(), LoraConfig(target_modules=["q_proj"])), adapter_name="x")


def test_loading_from_nowhere(tmp_path):
    with pytest.raises(BlobError, match="expected a folder or Hub repo with a"):
        BlobModel.from_pretrained(tmp_path)
    trained("bart", tmp_path / "base").save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(BlobError, match=r"cannot load the base model .*gone"):
        BlobModel.from_pretrained(tmp_path / "adapter")
    mapping = {"base_model_class": "system", "parent_library": "os"}
    file.write_text(json.dumps({**config, "auto_mapping": mapping}))
    with pytest.raises(BlobError, match="not from transformers"):
        BlobModel.from_pretrained(tmp_path / "adapter")


# ----- PEFT's verbs on several adapters --------------------------------------------------------------------------


def two_adapters(tmp_path, family="bart"):
    model = trained(family, tmp_path / "base", init_eps=0.5)
    config = BlobConfig(target_modules=TARGETS[family], task_type=TASK[family], r=2, init_eps=0.5)
    model.add_adapter("second", config)
    model.set_adapter("second")
    randomize_b(model)
    return model.eval()


def test_two_adapters_are_saved_loaded_and_switched_by_name(tmp_path):
    model, inputs = two_adapters(tmp_path), inputs_for("bart")
    model.save_pretrained(tmp_path / "both")
    loaded = BlobModel.from_pretrained(tmp_path / "both")
    loaded.load_adapter(tmp_path / "both", "second", subfolder="second")
    for name in ("default", "second"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))
        with model.posterior_samples(1, seed=1), loaded.posterior_samples(1, seed=1):
            assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    loaded.delete_adapter("second")
    assert set(loaded.peft_config) == {"default"}


def test_merging_the_mean_and_merging_a_sample(tmp_path):
    """Merged weights are the same network up to rounding: W x + s B A x against (W + s B A) x."""
    inputs = inputs_for("roberta")
    for merge, context in (
        (lambda m: m.merge_and_unload(), lambda m: m.posterior_mean()),
        (
            lambda m: m.merge_posterior_sample(seed=4, index=2),
            lambda m: m.posterior_samples(Sampling(1, seed=4, first=2)),
        ),
    ):
        model = trained("roberta", tmp_path / "base", init_eps=0.9)
        with context(model):
            expected = logits(model, inputs)
        base = merge(model)
        assert type(base).__name__ == "RobertaForSequenceClassification"
        assert not any("lora" in name for name, _ in base.named_parameters())
        torch.testing.assert_close(logits(base, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_merging_an_adapted_lm_head_leaves_the_tied_embeddings_alone(family, tmp_path):
    config = BlobConfig(target_modules=["lm_head"], task_type="SEQ_2_SEQ_LM", init_eps=0.9)
    model, inputs = get_blob_model(saved_base(family, tmp_path / "base"), config).eval(), inputs_for(family)
    randomize_b(model)
    expected = logits(model, inputs)
    kept = copy.deepcopy(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again, inputs), logits(merged, inputs))
    kept.merge_adapter()
    torch.testing.assert_close(logits(kept, inputs), expected, rtol=1e-4, atol=1e-5)
    kept.unmerge_adapter()
    torch.testing.assert_close(logits(kept, inputs), expected, rtol=1e-4, atol=1e-5)


def test_merging_a_sample_needs_a_posterior_that_is_not_merged(tmp_path):
    model = trained("bert", tmp_path / "base")
    model.merge_adapter()
    with pytest.raises(BlobError, match="unmerge_adapter"):
        model.merge_posterior_sample(seed=0)
    lora = get_lora_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(BlobError, match="no posterior"):
        lora.merge_posterior_sample(seed=0)


def test_modules_to_save_come_with_the_adapter(tmp_path):
    config = BlobConfig(target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM", modules_to_save=["final_layer_norm"])
    model = get_blob_model(saved_base("bart", tmp_path / "base"), config)
    for name, value in model.named_parameters():
        if "modules_to_save" in name:
            assert value.requires_grad
            value.data.normal_()
    model.eval().save_pretrained(tmp_path / "adapter")
    inputs = inputs_for("bart")
    assert torch.equal(logits(BlobModel.from_pretrained(tmp_path / "adapter"), inputs), logits(model, inputs))


def test_the_configuration_for_a_plain_adapter_is_the_callers(tmp_path):
    lora = get_peft_model(saved_base("bert", tmp_path / "base"), LoraConfig(target_modules=["query"], r=4))
    lora.save_pretrained(tmp_path / "lora")
    posterior = BlobConfig(prior_std=0.7, init_eps=0.4, std_parameterization="softplus", noise="local")
    base = tiny_bert().from_pretrained(tmp_path / "base")
    config = BlobModel.from_pretrained(tmp_path / "lora", model=base, config=posterior).blob_config
    assert (config.prior_std, config.init_eps, config.std_parameterization, config.noise) == (
        0.7,
        0.4,
        "softplus",
        "local",
    )
    assert config.r == 4


def test_what_a_blob_model_took_over_cannot_be_saved_as_what_it_was(tmp_path):
    """PEFT would write rho among the weights and no std."""
    lora = get_peft_model(saved_base("bert", tmp_path / "base"), LoraConfig(target_modules=["query"], r=4))
    bayesianize(lora).save_pretrained(tmp_path / "blob")
    with pytest.raises(BlobError, match="save the one that bayesianize returned"):
        lora.save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora").exists() and BlobModel.from_pretrained(tmp_path / "blob").has_posterior


def test_a_model_built_by_its_class_has_a_posterior_and_saves_it(tmp_path):
    config = BlobConfig(target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM", init_eps=0.5)
    model = BlobModelForSeq2SeqLM(saved_base("bart", tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    loaded = BlobModel.from_pretrained(tmp_path / "adapter", model=saved_base("bart", tmp_path / "base"))
    assert loaded.posterior_statistics() == model.posterior_statistics()


def test_a_deleted_adapter_takes_its_companions_along(tmp_path):
    model = get_lora_model(
        saved_base("bert", tmp_path / "base"), LoraConfig(target_modules=["query"], r=4, lora_dropout=0.2)
    )
    attach_mc_dropout(model)
    assert model.method == "mc_dropout"
    model.add_adapter("other", BlobConfig(target_modules=["query"], r=4))
    model.set_adapter("other")
    assert model.method == "blob"
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(target_modules=["query"], r=4))
    model.set_adapter("default")
    assert model.method == "lora"
