"""What ScalaBL and IVON share: files, checkpoints, sampled generation, engines."""

import copy

import pytest
import torch
from helpers.models import TARGETS, random_ids, randomize_b, tiny_bart, tiny_bert
from helpers.training import arguments, fit, parameters, rows
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from blob_hf import BlobError, BlobModel, BlobTrainer
from blob_hf.baselines import attach_ivon, attach_scalabl
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.routes import find_route
from blob_hf.inference.generate import generate_samples
from blob_hf.trainer import engines
from blob_hf.trainer.checkpoints import newest_complete
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.posterior import sampled_layers
from blob_hf.tuner.sampling import Sampling

METHODS = {"scalabl": attach_scalabl, "ivon": attach_ivon}


def make(method):
    def model():
        torch.manual_seed(0)
        config = LoraConfig(target_modules=TARGETS["bert"], r=4)
        return METHODS[method](get_lora_model(tiny_bert(), config))

    return model


def base():
    torch.manual_seed(0)
    return tiny_bert()


def state(model):
    beside = {f"{layer.name} h": layer.hessian for layer in sampled_layers(model) if hasattr(layer, "hessian")}
    return {**parameters(model), **beside}


@pytest.mark.parametrize("method", METHODS)
def test_saved_loaded_and_served_by_plain_peft(tmp_path, method):
    trainer, _ = fit(tmp_path / "run", method, make(method), max_steps=3)
    model, ids = trainer.model.eval(), random_ids(3, 8)
    model.save_pretrained(tmp_path / "saved")
    loaded = BlobModel.from_pretrained(tmp_path / "saved", model=base())
    assert loaded.method == method and loaded.companion("method") == model.companion("method")
    with model.posterior_samples(2), loaded.posterior_samples(2):
        samples = model(input_ids=ids.repeat(2, 1)).logits
        assert torch.equal(samples, loaded(input_ids=ids.repeat(2, 1)).logits)
    mean = model(input_ids=ids).logits
    assert not torch.allclose(samples[:3], mean, atol=1e-4)
    plain = PeftModel.from_pretrained(base(), tmp_path / "saved").eval()
    torch.testing.assert_close(plain(input_ids=ids).logits, mean, atol=1e-5, rtol=1e-5)
    names = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert all(name.endswith((".weight", ".bias")) for name in names)
    merged = copy.deepcopy(model).merge_posterior_sample(seed=0, index=1)
    torch.testing.assert_close(merged(input_ids=ids).logits, samples[3:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, method):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole, _ = fit(tmp_path, method, make(method), rows(40), **saving)
    checkpoint = str(tmp_path / "checkpoint-3")
    resumed, _ = fit(tmp_path / "more", method, make(method), rows(40), resume_from_checkpoint=checkpoint, **saving)
    expected = state(whole.model)
    for name, value in state(resumed.model).items():
        assert torch.equal(value, expected[name]), name
    started = state(make(method)())
    assert any(not torch.equal(value, started[name]) for name, value in expected.items())
    # the best checkpoint is loaded with what it has beside its weights
    resumed.model.load_adapter(newest_complete(str(tmp_path)), "default")
    assert all(torch.equal(value, expected[name]) for name, value in state(resumed.model).items() if name in expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_is_held_for_a_whole_generation(method):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="SEQ_2_SEQ_LM")
    torch.manual_seed(0)
    model = get_lora_model(tiny_bart(), config).eval()
    randomize_b(model, 5.0)
    METHODS[method](model)
    for layer in sampled_layers(model):
        layer.scale_noise(8.0)
    ids = random_ids(2, 7)
    texts = generate_samples(model, {"input_ids": ids}, Sampling(3, seed=1), max_new_tokens=6, do_sample=False)
    for s in range(3):
        fixed = copy.deepcopy(model)
        for layer in sampled_layers(fixed):
            layer.fix_at_sample(Sampling(1, seed=1, first=s))
        alone = fixed.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert texts[:, s, : alone.shape[1]].tolist() == alone.tolist()
    assert len({tuple(row) for row in texts[0].tolist()}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_training_goes_on_from_plain_lora_and_from_an_adapter_of_its_own(tmp_path, method):
    route, method_args = find_route(method), MethodArguments(method)
    trainer, _ = fit(tmp_path / "run", method, make(method), max_steps=2)
    trainer.save_model(str(tmp_path / "own"))
    torch.manual_seed(0)
    get_lora_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"], r=4)).save_pretrained(tmp_path / "lora")
    for name in ("own", "lora"):
        torch.manual_seed(0)
        model = route.load_model(base(), str(tmp_path / name), arguments(tmp_path, do_train=True), {})
        route.configure(model, method_args)
        assert model.method == method and sampled_layers(model)
        if name == "own":
            expected = state(trainer.model)
            assert all(torch.equal(value, expected[key]) for key, value in state(model).items())
        again, _ = fit(tmp_path / f"{name}-more", method, lambda model=model: model, max_steps=1)
        assert again.state.global_step == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_training_of_a_fresh_model_has_an_optimizer_of_its_own(tmp_path, method):
    args = arguments(tmp_path, max_steps=2)
    again = BlobTrainer(model_init=make(method), args=args, train_dataset=rows(), point_estimate=True)
    results = []
    for _ in range(2):  # as the trials of a search
        torch.manual_seed(0)
        again.train()
        results.append(state(again.model))
        assert again.own_optimizer is again.optimizer.optimizer
    started = state(make(method)())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert any(not torch.equal(value, started[name]) for name, value in results[0].items())
    with pytest.raises(BlobError, match="the optimizer already has a scheduler"):
        optimizer = torch.optim.SGD(again.model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        BlobTrainer(
            model=again.model, args=args, train_dataset=rows(), optimizers=(optimizer, scheduler), point_estimate=True
        ).train()


@pytest.mark.parametrize("method", METHODS)
def test_sharded_engines_are_refused_in_one_line(tmp_path, monkeypatch, method):
    monkeypatch.setattr(engines, "engine_of", lambda accelerator: "zero-2 x 2")
    with pytest.raises(BlobError, match=f"method {method} works with whole models, not under DeepSpeed or FSDP"):
        fit(tmp_path, method, make(method), max_steps=1)
