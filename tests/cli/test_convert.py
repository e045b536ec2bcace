import json
import subprocess
import sys

import pytest
import torch
from helpers.models import random_ids, randomize_b, tiny_gpt2, tiny_roberta
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from blob_hf import BlobModel
from blob_hf.cli.convert import convert, main
from blob_hf.tuner.adapter_files import STD_FILE
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.utils.errors import BlobError

AUTHORS_TARGETS = {"gpt2": ["c_attn"], "roberta": ["query", "value", "classifier.dense", "classifier.out_proj"]}


def authors_checkpoint(folder, family="gpt2", eps=0.05, suffix=""):
    """What the authors' `save_pretrained` leaves: PEFT's files of plain LoRA, with a rho among the weights."""
    base = {"gpt2": tiny_gpt2, "roberta": tiny_roberta}[family]()
    task_type = "CAUSAL_LM" if family == "gpt2" else None  # theirs is a bare PeftModel: it does not touch the head
    base.save_pretrained(folder / "base")
    base = type(base).from_pretrained(folder / "base")
    lora = get_peft_model(base, LoraConfig(target_modules=AUTHORS_TARGETS[family], task_type=task_type, r=4)).eval()
    randomize_b(lora)
    lora.save_pretrained(folder / "theirs")
    file = folder / "theirs" / "adapter_model.safetensors"
    weights = load_file(file)
    rhos = {}
    for name, value in list(weights.items()):
        if name.endswith("lora_A.weight"):
            low, high = (eps / 2**0.5, eps) if eps > 0 else (eps - 1, eps)
            rhos[name] = torch.empty_like(value).uniform_(low, high)
            weights[name.replace("lora_A.weight", "lora_A_rho") + suffix] = rhos[name]
    save_file(weights, file, {"format": "pt"})
    return lora, rhos


@pytest.mark.parametrize("suffix", ["", ".default"])
@pytest.mark.parametrize("eps", [0.05, -0.5])
def test_a_converted_checkpoint_has_their_mean_and_their_std(tmp_path, eps, suffix):
    lora, rhos = authors_checkpoint(tmp_path, eps=eps, suffix=suffix)
    main([str(tmp_path / "theirs"), str(tmp_path / "ours"), "--prior_std", "0.3"])
    model = BlobModel.from_pretrained(tmp_path / "ours").eval()
    ids = random_ids(2, 6)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, lora(input_ids=ids).logits)
    layers = gaussian_layers(model)
    for name, rho in rhos.items():
        expected = rho**2 if eps > 0 else torch.log1p(torch.exp(rho))  # as in their blob.py
        torch.testing.assert_close(
            layers[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")].std, expected
        )
    assert model.blob_config.prior_std == 0.3
    base = tiny_gpt2().from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert set(load_file(tmp_path / "ours" / "adapter_model.safetensors")) == set(rhos) | {
        name.replace("lora_A", "lora_B") for name in rhos
    }
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, lora(input_ids=ids).logits)


def test_a_head_that_their_checkpoint_lacks_is_told(tmp_path, caplog):
    authors_checkpoint(tmp_path, "roberta")
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": "SEQ_CLS"}))
    convert(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    BlobModel.from_pretrained(tmp_path / "ours")
    assert "does not hold the head under its LoRA" in caplog.text


def change(file, edit):
    weights = load_file(file)
    edit(weights, next(name for name in weights if "rho" in name))
    save_file(weights, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w, name: [w.pop(key) for key in list(w) if "rho" in key], "has no lora_A_rho: it is a plain LoRA"),
        (lambda w, name: w.update({name: w[name][:2].clone()}), "no mean of its shape"),
        (lambda w, name: w.pop(name.replace("_rho", ".weight")), "no mean of its shape"),
        (lambda w, name: w[name].fill_(float("nan")), "is not finite"),
        (lambda w, name: w.pop(name), "stds for other layers than the adapter"),
        (lambda w, name: w[name.replace("_rho", ".weight")].fill_(float("inf")), "NaN or infinite"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(tmp_path, damage, message):
    authors_checkpoint(tmp_path)
    change(tmp_path / "theirs" / "adapter_model.safetensors", damage)
    with pytest.raises(BlobError, match=message):
        convert(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    assert not (tmp_path / "ours" / STD_FILE).exists() and not list(tmp_path.glob("ours/*"))


@pytest.mark.slow
def test_a_taken_destination_and_a_missing_source_exit_with_2(tmp_path):
    authors_checkpoint(tmp_path)
    command = [sys.executable, "-m", "blob_hf.cli.convert", str(tmp_path / "theirs")]
    done = subprocess.run([*command, str(tmp_path / "theirs")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")
    assert "already holds an adapter" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path / "nowhere"), str(tmp_path / "ours")])
    assert exit_.value.code == 2
