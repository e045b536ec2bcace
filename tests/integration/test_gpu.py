"""On a GPU: the same networks as on the CPU, training in bfloat16, and an exact resume."""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.models import TARGETS, TINY, random_ids, randomize_b
from helpers.training import blob_bert, parameters, rows, trainer
from transformers import AutoModelForSequenceClassification

from blob_hf import BlobConfig, Sampling, generate_predictive, get_blob_model
from blob_hf.tuner.posterior import gaussian_layers, kl_divergence

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

TASK = {"bert": "SEQ_CLS", "bart": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM"}


def make(family, noise="shared"):
    model = get_blob_model(
        TINY[family](), BlobConfig(target_modules=TARGETS[family], init_eps=0.9, task_type=TASK[family], noise=noise)
    )
    randomize_b(model)
    return model.eval()


@pytest.fixture(autouse=True)
def _exact_matrix_products():
    """TensorFloat-32 would round to 3 digits; a trainer of a test before this may have settled on the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("family", TASK)
@torch.no_grad()
def test_a_sample_is_the_same_network_as_on_the_cpu(family):
    model, ids = make(family), random_ids(5, 9)
    sampling = Sampling(4, seed=3)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if family == "bart" else {})}
    with model.posterior_samples(sampling, repeat=True):
        expected = model(**inputs).logits
    model.cuda()
    with model.posterior_samples(sampling, repeat=True):
        found = model(**{name: value.cuda() for name, value in inputs.items()}).logits
    assert found.is_cuda
    assert (expected[0] - expected[1]).abs().max() > 1e-2  # another sample is another network
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_sampled_generation_is_each_merged_network_alone(family):
    model = make(family).cuda()
    ids = random_ids(3, 9).cuda()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = model.generate(input_ids=ids, sampling=Sampling(3, seed=4), **options)
    for s in range(3):
        alone = copy.deepcopy(model).merge_posterior_sample(4, s).eval().generate(input_ids=ids, **options)
        assert torch.equal(together[s::3][:, : alone.shape[1]], alone)


def test_predictive_decoding_averages_the_probabilities():
    model = make("gpt2").cuda()
    ids = random_ids(2, 9).cuda()
    output = generate_predictive(
        model, {"input_ids": ids}, Sampling(4, seed=4), max_new_tokens=1, do_sample=False, pad_token_id=0
    )
    networks = [copy.deepcopy(model).merge_posterior_sample(4, s).eval() for s in range(4)]
    with torch.no_grad():
        mean = torch.stack([one(input_ids=ids).logits[:, -1].softmax(-1) for one in networks]).mean(0)
    assert torch.equal(output.sequences[:, -1], mean.argmax(-1))


@pytest.mark.parametrize("noise", ["shared", "local", "flipout"])
def test_noise_in_training_has_the_variance_of_the_posterior(noise):
    """Of the logits over 4,000 noisy forwards: their std within 10 %, four standard errors being 4.5 %."""
    model = make("bert", noise).cuda()
    ids = random_ids(1, 9).cuda().repeat(400, 1) if noise != "shared" else random_ids(1, 9).cuda()
    model.train()
    with torch.no_grad():
        drawn = torch.cat([model(input_ids=ids).logits for _ in range(10 if noise != "shared" else 4000)])
        model.eval()
        with model.posterior_samples(Sampling(4000, seed=1), repeat=True):
            truth = model(input_ids=ids[:1]).logits
    if noise != "local":  # whose positions have each their own noise
        torch.testing.assert_close(drawn.std(0), truth.std(0), rtol=0.1, atol=0)
    assert drawn.std(0).min() > 0.1 * truth.std(0).min()


def run(folder, **changes):
    model = changes.pop("model", None)
    return trainer(folder, model or blob_bert(noise="flipout"), use_cpu=False, **changes)


def test_bfloat16_trains_a_float32_posterior(tmp_path):
    job = run(tmp_path, bf16=True, max_steps=40, data=rows(48), per_device_train_batch_size=16, learning_rate=2e-2)
    before = parameters(job.model)
    assert job.model.device.type == "cuda"
    job.train()
    for layer in gaussian_layers(job.model).values():
        assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    after = parameters(job.model)
    assert any("rho" in name for name in after)
    assert all(not torch.equal(before[name].cuda(), after[name]) for name in after)
    losses = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_kl_is_that_of_the_cpu():
    model = make("bert")
    expected = float(kl_divergence(model, 0.2))
    assert float(kl_divergence(model.cuda(), 0.2)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_a_resumed_run_is_bit_identical(tmp_path, half):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "bf16": half}
    whole = run(tmp_path / "whole", **options)
    whole.train()
    again = run(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in parameters(whole.model).items():
        assert torch.equal(parameters(again.model)[name], value), name


def test_evaluation_is_that_of_the_cpu(tmp_path):
    expected = trainer(tmp_path / "cpu", blob_bert(init_eps=0.9)).evaluate()
    AcceleratorState._reset_state(reset_partial_state=True)  # which keeps the device of a process
    on_gpu = trainer(tmp_path / "gpu", blob_bert(init_eps=0.9), use_cpu=False)
    assert on_gpu.model.device.type == "cuda"
    found = on_gpu.evaluate()
    for name in ("eval_nll", "eval_accuracy", "eval_ece"):
        if name in expected:
            assert found[name] == pytest.approx(expected[name], abs=1e-4)
    assert "eval_nll" in expected


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_keeps_a_float32_posterior(tmp_path, half):
    TINY["bert"]().save_pretrained(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=half).cuda()
    model = get_blob_model(base, BlobConfig(target_modules=TARGETS["bert"]))
    layer = next(iter(gaussian_layers(model).values()))
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    with model.posterior_samples(Sampling(3), repeat=True), torch.no_grad():
        assert torch.isfinite(model(input_ids=random_ids(2, 8).cuda()).logits).all()
