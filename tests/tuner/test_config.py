import json

import pytest
from peft import LoraConfig

from blob_hf import BlobConfig
from blob_hf.tuner.config import default_target_modules
from blob_hf.utils.errors import BlobError


def test_round_trip_and_plain_peft_reads_it_as_lora(tmp_path):
    config = BlobConfig(r=4, target_modules=["query"], prior_std=0.1, noise="local", std_parameterization="softplus")
    config.save_pretrained(str(tmp_path))
    loaded = BlobConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is BlobConfig
    assert (loaded.r, loaded.prior_std, loaded.noise, loaded.std_parameterization) == (4, 0.1, "local", "softplus")
    with pytest.warns(UserWarning, match="prior_std"):
        plain = LoraConfig.from_pretrained(str(tmp_path))
    assert type(plain) is LoraConfig and plain.r == 4


def test_a_plain_lora_config_becomes_a_blob_config(tmp_path):
    lora = LoraConfig(r=3, lora_alpha=7, target_modules=["value"])
    assert BlobConfig.from_lora(lora, BlobConfig(prior_std=0.4)).lora_alpha == 7
    assert BlobConfig.from_lora(lora, BlobConfig(prior_std=0.4)).prior_std == 0.4
    lora.save_pretrained(str(tmp_path))
    assert BlobConfig.from_pretrained(str(tmp_path)).r == 3


def test_unknown_fields_of_a_newer_version_warn(tmp_path):
    BlobConfig(target_modules=["q"]).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        BlobConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior_std": 0}, "prior_std must be > 0, got 0"),
        ({"prior_std": float("nan")}, "prior_std must be > 0"),
        ({"init_eps": -1}, "init_eps must be > 0, got -1"),
        ({"noise": "gauss"}, "noise must be one of flipout, local, shared, got 'gauss'"),
        ({"std_parameterization": "exp"}, "std_parameterization must be one of square, softplus"),
        ({"use_dora": True}, "plain LoRA; switch off use_dora"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(BlobError, match=message):
        BlobConfig(**change)


def test_presets():
    assert default_target_modules("roberta", "classification")[-1] == "classifier.out_proj"
    assert default_target_modules("bart", "summarization") == ["q_proj", "k_proj", "v_proj", "lm_head"]
    assert default_target_modules("mamba", "classification") == "all-linear"
