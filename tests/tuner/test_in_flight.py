"""Samples in flight belong to the context that froze them; batches that repeat themselves; trainings without a KL."""

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.models import TINY
from transformers import Trainer, TrainingArguments

from blob_hf import BlobConfig, BlobModel, Sampling, get_blob_model
from blob_hf.inference.evaluating import evaluating
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.utils.errors import BlobError

X = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])


@pytest.fixture
def model() -> BlobModel:
    torch.manual_seed(0)
    model = get_blob_model(TINY["bert"](), BlobConfig(target_modules=["query", "value"], init_eps=0.8)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def sampled(model: BlobModel, seed: int) -> torch.Tensor:
    with torch.no_grad(), model.posterior_samples(3, seed=seed):
        return model(input_ids=X.repeat(3, 1)).logits


def test_threads_have_samples_of_their_own(model):
    """Eight threads, each with its seed, and two without samples, all at once: each answer is the lone one."""
    expected, mean = [sampled(model, seed) for seed in range(8)], model(input_ids=X).logits
    start = threading.Barrier(10)

    def work(worker: int) -> bool:
        start.wait()
        if worker >= 8:
            return all(torch.equal(model(input_ids=X).logits, mean) for _ in range(40))
        return all(torch.equal(sampled(model, worker), expected[worker]) for _ in range(15))

    with ThreadPoolExecutor(10) as pool:
        assert all(pool.map(work, range(10)))
    assert torch.equal(model(input_ids=X).logits, mean)
    assert not any(layer.is_frozen_somewhere for layer in gaussian_layers(model).values())


def test_tasks_of_asyncio_have_samples_of_their_own(model):
    expected = [sampled(model, seed) for seed in range(4)]

    async def work(seed: int) -> torch.Tensor:
        with model.posterior_samples(3, seed=seed):  # no_grad would be the thread's, not the task's
            await asyncio.sleep(0)  # the others open theirs
            inner = model(input_ids=X.repeat(3, 1)).logits
            outer = await asyncio.to_thread(lambda: model(input_ids=X.repeat(3, 1)).logits)
        assert torch.equal(inner, outer)
        return inner

    async def everyone() -> list[torch.Tensor]:
        return await asyncio.gather(*map(work, range(4)))

    assert all(torch.equal(a, b) for a, b in zip(asyncio.run(everyone()), expected, strict=True))


def test_the_mean_in_one_thread_leaves_the_noise_of_another(model):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with model.posterior_mean():
            inside.set()
            go_on.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(20)
    noisy = [model(input_ids=X).logits for _ in range(2)]
    go_on.set()
    thread.join()
    assert not torch.equal(*noisy)


def test_eval_mode_lasts_until_the_last_thread_has_left(model):
    model.train()
    first, second = evaluating(model), evaluating(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    second.__exit__(None, None, None)
    assert all(module.training for module in model.modules())


def test_a_backward_pass_in_another_thread_does_not_recompute_with_other_weights(model):
    """As autograd does on a GPU: its threads do not know the samples that gradient checkpointing recomputes with."""
    layer = next(iter(gaussian_layers(model).values()))
    x = torch.randn(4, 16, requires_grad=True)
    errors: list[BaseException] = []

    def backward(loss: torch.Tensor) -> None:
        try:
            loss.backward()
        except BlobError as error:
            errors.append(error)

    with layer.frozen_samples(Sampling(2, seed=0)):
        out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        thread = threading.Thread(target=backward, args=(out.sum(),))
        thread.start()
        thread.join()
    assert "gradient checkpointing cannot recompute" in str(errors[0])


def test_merging_inside_is_refused(model):
    for context in (model.posterior_samples(2), model.posterior_mean()):
        with context, pytest.raises(BlobError, match="cannot be merged"):
            model.merge_adapter()
    model.merge_adapter()


def test_copies_of_data_parallel_are_refused(model):
    layer = next(iter(gaussian_layers(model).values()))
    with layer.frozen_samples(Sampling(2)):
        copy = layer._replicate_for_data_parallel()
        copy.weight = layer.weight
        with pytest.raises(BlobError, match="DataParallel cannot hold posterior samples"):
            copy(torch.randn(2, 16))


# ----- batches that repeat themselves -----------------------------------------------------------------------------


def test_repeat_gives_each_sample_all_inputs(model):
    mask = torch.ones_like(X)
    mask[1, 2:] = 0
    with torch.no_grad(), model.posterior_samples(3, seed=1):
        by_hand = model(input_ids=X.repeat(3, 1), attention_mask=mask.repeat(3, 1)).logits
        wrong = model(input_ids=X.repeat_interleave(3, 0), attention_mask=mask.repeat_interleave(3, 0)).logits
    with torch.no_grad(), model.posterior_samples(3, seed=1, repeat=True):
        assert torch.equal(model(input_ids=X, attention_mask=mask).logits, by_hand)
        assert torch.equal(model(X, mask).logits, by_hand)
    assert not torch.allclose(wrong, by_hand)
    with torch.no_grad(), model.posterior_samples(3, seed=1), pytest.raises(BlobError, match="repeat_interleave"):
        model(input_ids=X[:2])
    with model.posterior_samples(2, repeat=True), pytest.raises(BlobError, match="needs a batch of tensors"):
        model()


def test_what_predicts_inside_repeats_its_own_batches(model):
    alone = model.predict({"input_ids": X}, sampling=Sampling(2, seed=4)).probabilities
    with model.posterior_samples(3, seed=1, repeat=True):
        inside = model.predict({"input_ids": X}, sampling=Sampling(2, seed=4)).probabilities
        with model.posterior_mean():
            assert len(model(input_ids=X).logits) == len(X)
        assert len(model(input_ids=X).logits) == 3 * len(X)
    assert (inside == alone).all()


def test_repeat_is_for_generate_too():
    torch.manual_seed(0)
    model = get_blob_model(TINY["gpt2"](), BlobConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", init_eps=0.8))
    model.eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with model.posterior_samples(2, seed=1):
        by_hand = model.generate(input_ids=X.repeat(2, 1), attention_mask=torch.ones_like(X).repeat(2, 1), **options)
    with model.posterior_samples(2, seed=1, repeat=True):
        assert torch.equal(model.generate(input_ids=X, attention_mask=torch.ones_like(X), **options), by_hand)


# ----- a posterior that is trained without its KL -----------------------------------------------------------------


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": X[i % 3], "labels": torch.tensor(i % 3)} for i in range(count)]


def test_a_plain_trainer_is_told_that_it_trains_no_posterior(model, tmp_path, caplog):
    model.requires_grad_(True)
    args = TrainingArguments(tmp_path, max_steps=25, per_device_train_batch_size=2, report_to="none", use_cpu=True)
    with caplog.at_level(logging.WARNING, "blob_hf"):
        Trainer(model, args, train_dataset=rows(50)).train()
    assert len([r for r in caplog.records if "without the KL of the posterior" in r.message]) == 1


def test_a_loop_that_adds_the_kl_is_not(model, caplog):
    model.requires_grad_(True).train()
    with caplog.at_level(logging.WARNING, "blob_hf"):
        for _ in range(25):
            (model(input_ids=X, labels=torch.tensor([0, 1, 2])).loss + 1e-3 * model.kl_divergence()).backward()
    assert not caplog.records
