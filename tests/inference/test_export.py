import json
import warnings

import pytest
import torch
from helpers.adapters import inputs_for, logits, trained
from helpers.models import TINY, tiny_bert
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from blob_hf import export_samples
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError


def plain_peft(model, base_folder, adapter):
    """The adapter as somebody without blob_hf loads it; a warning would tell of fields that PEFT does not know."""
    base = type(model.get_base_model()).from_pretrained(base_folder).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword arguments")
        return PeftModel.from_pretrained(base, adapter).eval()


@pytest.mark.parametrize("family", TINY)
def test_exported_samples_are_the_posterior_samples(family, tmp_path):
    model, inputs = trained(family, tmp_path / "base", init_eps=0.9), inputs_for(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folders = export_samples(model, 3, seed=7, out_dir=tmp_path / "samples")
    assert [folder.name for folder in folders] == ["sample-0", "sample-1", "sample-2"]
    found = torch.stack([logits(plain_peft(model, tmp_path / "base", folder), inputs) for folder in folders])
    for s in range(3):
        with model.posterior_samples(Sampling(1, seed=7, first=s)):
            assert torch.equal(found[s], logits(model, inputs)), s
    with model.posterior_samples(3, seed=7):
        ours = logits(model, {name: x.repeat(3, *[1] * (x.dim() - 1)) for name, x in inputs.items()})
    ours = ours.unflatten(0, (3, -1)).softmax(-1).mean(0)
    torch.testing.assert_close(found.softmax(-1).mean(0), ours)  # the posterior predictive, up to batching
    assert not torch.equal(found[0], found[1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_exported_sample_is_nothing_but_lora(tmp_path):
    model = trained("bart", tmp_path / "base")
    (folder,) = export_samples(model, 1, out_dir=tmp_path / "samples")
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not {"prior_std", "noise"} & config.keys()
    assert all(".lora_A." in name or ".lora_B." in name for name in load_file(folder / "adapter_model.safetensors"))


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(BlobError, match="no posterior"):
        export_samples(get_lora_model(tiny_bert(), LoraConfig(target_modules=["query"])), 2, 0, tmp_path)
    model = trained("bart", tmp_path / "base")
    with pytest.raises(BlobError, match="num_samples must be >= 1, got 0"):
        export_samples(model, 0, 0, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(BlobError, match="cannot write to"):
        export_samples(model, 1, 0, tmp_path / "file")


@pytest.mark.parametrize(("init", "family"), [("pissa", "bert"), ("olora", "bert"), ("pissa", "gpt2")])
def test_samples_of_an_adapter_that_changed_its_base_are_for_the_original_base(init, family, tmp_path):
    """A server has the base model as it is on the Hub, and does not know how PEFT would change it."""
    patterns = {"use_rslora": True, "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 3}}
    model = trained(family, tmp_path / "base", init_eps=0.9, init_lora_weights=init, **patterns)
    inputs = inputs_for(family)
    (folder,) = export_samples(model, 1, seed=7, out_dir=tmp_path / "samples")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == 8 and config["rank_pattern"] == {"query": 4}
    with model.posterior_samples(1, seed=7):
        expected = logits(model, inputs)
    torch.testing.assert_close(
        logits(plain_peft(model, tmp_path / "base", folder), inputs), expected, rtol=1e-3, atol=1e-4
    )
    other = type(model.get_base_model()).from_pretrained(tmp_path / "base")
    for value in other.parameters():
        value.data.normal_()
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(BlobError, match=f"lacks more than init_lora_weights='{init}' of rank .* is not the base model"):
        export_samples(model, 1, seed=7, out_dir=tmp_path / "samples")
    model.active_peft_config.base_model_name_or_path = str(tmp_path / "gone")
    with pytest.raises(BlobError, match="has changed the base model, and the original one"):
        export_samples(model, 1, seed=7, out_dir=tmp_path / "samples")
