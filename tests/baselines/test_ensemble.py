"""Ensembles: their mixture against adapters that are loaded one by one, and their members against plain trainings."""

import copy

import pytest
import torch
from helpers.adapters import TASK
from helpers.models import TARGETS, TINY, random_ids, randomize_b, tiny_bert
from helpers.running import GLUE, run_script
from helpers.training import arguments, fit, rows
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from blob_hf import BlobError, BlobModel, BlobTrainer
from blob_hf.baselines.ensemble import join_members
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.routes import find_route
from blob_hf.inference.export import export_samples
from blob_hf.inference.predict import predict_classes
from blob_hf.tuner.build import get_lora_model, load_lora
from blob_hf.tuner.posterior import sampled_layers
from blob_hf.tuner.sampled import SampledLinear
from blob_hf.tuner.sampling import Sampling

HEADS = {"frozen at random under LoRA": TARGETS["bert"], "trained by PEFT": ["query", "value"]}


def member(base, folder, seed, targets, r=4):
    """A plain LoRA adapter with weights of its own, its head (trained or frozen) included."""
    torch.manual_seed(seed)
    base = copy.deepcopy(base)
    base.classifier.reset_parameters()
    model = get_lora_model(base, LoraConfig(target_modules=targets, r=r, task_type="SEQ_CLS"))
    randomize_b(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(params=list(HEADS))
def members(request, tmp_path):
    """A base model, three adapters on it, and an ensemble of them."""
    torch.manual_seed(0)
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base").eval()
    folders = [member(base, tmp_path / str(k), k + 1, HEADS[request.param]) for k in range(3)]
    model = load_lora(copy.deepcopy(base), folders[0]).eval()
    join_members(model, folders[1:])
    return base, folders, model


def alone(base, folder, ids):
    """Log-probabilities of one member, loaded by PEFT itself."""
    with torch.no_grad():
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(input_ids=ids).logits.log_softmax(-1)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_the_mixture_is_that_of_separately_loaded_adapters(members, together):
    base, folders, model = members
    ids = random_ids(5, 9)
    each = torch.stack([alone(base, folder, ids) for folder in folders], dim=1)
    assert (each[:, 0] - each[:, 1]).abs().max() > 0.05 and (each[:, 1] - each[:, 2]).abs().max() > 0.05
    found = predict_classes(model, {"input_ids": ids}, Sampling(3, batch_size=together))
    torch.testing.assert_close(found.sample_log_probs, each, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.log_probs, each.exp().mean(1).log(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.mean_log_probs, each[:, 0], atol=1e-5, rtol=1e-5)


def test_a_saved_ensemble_predicts_the_same(members, tmp_path):
    base, folders, model = members
    model.save_pretrained(tmp_path / "saved")
    again = BlobModel.from_pretrained(tmp_path / "saved", model=copy.deepcopy(base)).eval()
    by_itself = BlobModel.from_pretrained(tmp_path / "saved").eval()  # finds its base model
    ids = random_ids(5, 9)
    for other in (again, by_itself):
        assert other.method == "ensemble" and other.companion("method") == model.companion("method")
        first, second = (
            predict_classes(one, {"input_ids": ids}, Sampling(3)).sample_log_probs for one in (model, other)
        )
        torch.testing.assert_close(first, second)
    # under another name PEFT's layout has the members beside the first one
    named = BlobModel.from_pretrained(tmp_path / "saved", model=copy.deepcopy(base), adapter_name="x").eval()
    named.save_pretrained(tmp_path / "named")
    named = BlobModel.from_pretrained(tmp_path / "named" / "x", model=copy.deepcopy(base)).eval()
    torch.testing.assert_close(predict_classes(named, {"input_ids": ids}, Sampling(3)).sample_log_probs, first)
    # every part is an adapter of its own, and the first one is what plain PEFT sees
    for name, folder in zip(("", "member-2", "member-3"), folders, strict=True):
        torch.testing.assert_close(alone(base, tmp_path / "saved" / name, ids), alone(base, folder, ids))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "ensemble of LoRA adapters" in card and "posterior_samples(3, seed=0)" in card


def test_a_member_can_be_exported_and_merged(members, tmp_path):
    base, folders, model = members
    ids = random_ids(4, 9)
    exported = export_samples(model, 3, out_dir=tmp_path / "samples")
    for folder, sample in zip(folders, exported, strict=True):
        torch.testing.assert_close(alone(base, sample, ids), alone(base, folder, ids))
    merged = model.merge_posterior_sample(index=2).eval()
    torch.testing.assert_close(merged(input_ids=ids).logits.log_softmax(-1), alone(base, folders[2], ids))
    assert not any(isinstance(module, SampledLinear) for module in merged.modules())


def test_an_ensemble_of_summarizers_writes_a_text_of_each_member(tmp_path):
    torch.manual_seed(0)
    base = TINY["bart"]()
    folders, own = [], []
    ids = random_ids(2, 7)
    for k in range(2):
        model = get_lora_model(copy.deepcopy(base), LoraConfig(target_modules=TARGETS["bart"], task_type=TASK["bart"]))
        randomize_b(model, 2.0)
        model.eval().save_pretrained(tmp_path / str(k))
        folders.append(tmp_path / str(k))
        own.append(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False))
    joined = load_lora(base, folders[0]).eval()
    join_members(joined, folders[1:])
    texts = joined.generate(input_ids=ids, sampling=2, max_new_tokens=6, do_sample=False).view(2, 2, -1)
    for k, alone_ in enumerate(own):
        assert texts[:, k, : alone_.shape[1]].tolist() == alone_.tolist()


def model_init():
    return get_lora_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"], r=4))


def ensemble(folder, **changes):
    return fit(folder, "ensemble", model_init, seed=5, **changes)


def test_members_are_trained_as_plain_adapters_of_the_next_seeds(tmp_path):
    trainer, outcome = ensemble(tmp_path / "ensemble", ensemble_size=2)
    trainer.save_model()
    assert trainer.eval_sampling.num_samples == 2 and outcome.trained_parameters == 2 * 588
    for k, name in enumerate(("", "member-2")):
        args = arguments(tmp_path / f"lora{k}", seed=5 + k)
        single = BlobTrainer(model_init=model_init, args=args, train_dataset=rows(), point_estimate=True)
        single.train()
        single.save_model()
        expected = load_file(tmp_path / f"lora{k}" / "adapter_model.safetensors")
        found = load_file(tmp_path / "ensemble" / name / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key
    metrics = trainer.evaluate()
    assert metrics["eval_nll"] < metrics["eval_sample_nll"]  # Jensen: the mixture is better than its members' mean


def test_finished_members_are_not_trained_again(tmp_path):
    ensemble(tmp_path, ensemble_size=2)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("_members/*/adapter_model.safetensors")}
    assert len(times) == 2
    second, outcome = ensemble(tmp_path, ensemble_size=3)
    assert outcome.output.global_step == 3 * second.args.max_steps  # of all members, as they were trained
    assert outcome.trained_parameters == 3 * 588 and outcome.output.training_loss > 0.5
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert second.eval_sampling.num_samples == 3
    with pytest.raises(BlobError, match="holds a member trained with another learning_rate"):
        ensemble(tmp_path, ensemble_size=2, learning_rate=0.5)


def test_what_cannot_be_an_ensemble_is_one_line(members, tmp_path, monkeypatch, capfd):
    base, folders, model = members
    with pytest.raises(BlobError, match="ensemble_size must be >= 2, got 1"):
        find_route("ensemble").check(MethodArguments("ensemble", ensemble_size=1))
    with pytest.raises(BlobError, match="number of ensemble_members must be >= 2, got 1"):
        find_route("ensemble").check(MethodArguments("ensemble", ensemble_members=["one"]))
    with pytest.raises(BlobError, match="has 3 members, but 4 samples"), model.posterior_samples(4):
        pass
    with pytest.raises(BlobError, match="has 3 members, but 4 samples"), model.posterior_samples(Sampling(2, first=2)):
        pass
    other = member(base, tmp_path / "wide", 9, TARGETS["bert"], r=8)
    with pytest.raises(BlobError, match="cannot be a member: its r is 8, the first member's 4"):
        join_members(load_lora(copy.deepcopy(base), folders[0]), [other])


@pytest.mark.slow
def test_trained_members_are_put_together_by_the_script(monkeypatch, tmp_path, capsys):
    quick = ["--demo", "--max_steps", "4", "--max_eval_samples", "30", "--use_cpu", "true", "--compare_base", "false"]
    for seed in (1, 2):
        folder = tmp_path / f"lora{seed}"
        assert run_script(monkeypatch, GLUE, *quick, "--method", "lora", "--seed", seed, "--output_dir", folder) == 0
    names = [tmp_path / "lora1", tmp_path / "lora2"]
    joined = ["--method", "ensemble", "--ensemble_members", *names, "--output_dir", tmp_path / "joined"]
    assert run_script(monkeypatch, GLUE, *quick, *joined) == 0
    assert "N=2 (samples)" in capsys.readouterr().out
    loaded = BlobModel.from_pretrained(tmp_path / "joined")
    assert len(sampled_layers(loaded)) > 0 and loaded.companion("method").members == ["default", "member-2"]
