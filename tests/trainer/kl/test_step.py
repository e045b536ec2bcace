"""The decoupled KL step against autograd SGD on the KL."""

import pytest
import torch
from helpers.models import random_ids, randomize_b, tiny_bert
from peft.optimizers import create_lorafa_optimizer

from blob_hf import BlobConfig, get_blob_model
from blob_hf.trainer.kl.step import DecoupledKLStep
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.utils.errors import BlobError


def make(parameterization="square", prior_std=0.2):
    torch.manual_seed(0)
    config = BlobConfig(
        target_modules=["query", "value"],
        std_parameterization=parameterization,
        prior_std=prior_std,
        init_eps=0.5,
        noise="shared",
    )
    model = get_blob_model(tiny_bert(), config)
    randomize_b(model)
    return model


def attach(model, optimizer, **kwargs):
    config = model.blob_config
    return DecoupledKLStep(optimizer, model, config.prior_std, config.std_parameterization, **kwargs)


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def nll_step(model, optimizer):
    torch.manual_seed(1)
    ids = random_ids(4, 8)
    loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits, torch.tensor([0, 1, 2, 0]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("parameterization", ["square", "softplus"])
def test_is_sgd_on_the_autograd_kl_after_the_optimizers_step(parameterization):
    ours, truth = make(parameterization), make(parameterization)
    ours_adam = torch.optim.AdamW(trainable(ours), lr=1e-3, weight_decay=0)
    attach(ours, ours_adam, kl_learning_rate=0.01).weight = 0.25
    truth_adam = torch.optim.AdamW(trainable(truth), lr=1e-3, weight_decay=0)
    posterior = [p for layer in gaussian_layers(truth).values() for p in (layer.weight, layer.rho)]
    sgd = torch.optim.SGD(posterior, lr=0.01)
    for _ in range(4):
        nll_step(ours.train(), ours_adam)
        nll_step(truth.train(), truth_adam)
        sgd.zero_grad()
        (0.25 * truth.kl_divergence()).backward()
        sgd.step()
    for (name, left), right in zip(ours.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, msg=name)


def test_follows_the_learning_rate_schedule_in_shape():
    model = make()
    optimizer = torch.optim.SGD(trainable(model), lr=0.0 + 1e-3)
    step = attach(model, optimizer, kl_learning_rate=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: [0.0, 0.5, 1.0][min(t, 2)])
    layer = next(iter(gaussian_layers(model).values()))
    step.weight = 0.1
    moves = []
    for _ in range(3):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        optimizer.step()
        moves.append(((layer.weight - before) / before).mean().item())
        schedule.step()
    full = -0.01 * 0.1 / 0.2**2
    assert moves == pytest.approx([0, full / 2, full], rel=1e-3, abs=1e-7)


def test_groups_are_flagged_disjoint_and_complete():
    model = make()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, weight_decay=0.1)
    attach(model, optimizer, kl_learning_rate=0.01)
    roles = {group.get("blob_role"): group for group in optimizer.param_groups}
    assert set(roles) == {None, "mean", "rho"}
    layers = gaussian_layers(model).values()
    assert {id(p) for p in roles["rho"]["params"]} == {id(layer.rho) for layer in layers}
    assert {id(p) for p in roles["mean"]["params"]} == {id(layer.weight) for layer in layers}
    together = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in trainable(model))
    assert [roles[role]["weight_decay"] for role in (None, "mean", "rho")] == [0.1, 0.0, 0.0]


def test_repeated_steps_reach_the_prior_and_weight_zero_does_nothing():
    model = make()
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    step = attach(model, optimizer, kl_learning_rate=0.002)
    before = model.kl_divergence().item()
    optimizer.step()
    assert model.kl_divergence().item() == before
    step.weight = 0.5
    for _ in range(2000):
        optimizer.zero_grad()
        optimizer.step()
    assert model.kl_divergence().item() < 1e-4 * before
    assert model.posterior_statistics().total.mean_std == pytest.approx(0.2, rel=1e-3)


def test_works_on_flat_partitions_padded_with_zeros():
    """What ZeRO hands the optimizer: one flat tensor per group, zero-padded."""
    model = make()
    step = attach(model, torch.optim.SGD(trainable(model), lr=1e-3), kl_learning_rate=0.01)
    layers = list(gaussian_layers(model).values())
    for role, get in (("mean", lambda layer: layer.weight), ("rho", lambda layer: layer.rho)):
        flat = torch.cat([*(get(layer).detach().flatten() for layer in layers), torch.zeros(5)])
        step.apply([flat], role, rate=0.003)
        assert flat[-5:].tolist() == [0] * 5
        for layer in layers:
            step.apply([get(layer).data], role, rate=0.003)
        torch.testing.assert_close(flat[:-5], torch.cat([get(layer).detach().flatten() for layer in layers]))


def test_a_g_next_to_zero_is_not_thrown_beyond_the_prior():
    model = make()
    step = attach(model, torch.optim.SGD(trainable(model), lr=1e-3), kl_learning_rate=0.01)
    g = torch.tensor([1e-6, -1e-6, 0.3, -0.3, 2.0])
    step.apply([g], "rho", rate=0.001)
    prior_g = 0.2**0.5
    assert g[:2].tolist() == pytest.approx([prior_g, -prior_g])  # plain SGD would put them at 2000
    expected = 0.3 - 0.001 * 2 * (0.3**3 / 0.04 - 1 / 0.3)
    assert g[2:4].tolist() == pytest.approx([expected, -expected])
    assert prior_g < g[4] < 2.0


@pytest.mark.parametrize("rate", [0.01, 0.05, 3.0])
def test_a_mean_is_not_thrown_beyond_the_prior_by_a_small_beta(rate):
    model = make(prior_std=0.1)
    step = attach(model, torch.optim.SGD(trainable(model), lr=1e-3), kl_learning_rate=0.01)
    mean = torch.tensor([0.5, -0.5])
    step.apply([mean], "mean", rate)  # plain SGD: factor 1 - rate / 0.01, beyond 0 from rate 0.01 on
    assert mean.abs().max() < 1e-7


def test_a_g_that_adam_carries_through_zero_continues_as_its_absolute_value():
    """Training from -G with negated momentum is the mirror image, so the stds stay the same."""
    stds = []
    for sign in (1.0, -1.0):
        model = make()
        optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
        attach(model, optimizer, kl_learning_rate=0.01)
        for layer in gaussian_layers(model).values():
            layer.rho.data.mul_(0.1 * sign)
        for _ in range(5):
            nll_step(model.train(), optimizer)
            assert all((layer.rho >= 0).all() for layer in gaussian_layers(model).values())
        stds.append(torch.cat([layer.std.detach().flatten() for layer in gaussian_layers(model).values()]))
    torch.testing.assert_close(stds[0], stds[1], rtol=1e-4, atol=1e-7)


def test_optimizers_that_cannot_carry_the_kl_step_are_refused():
    model = make()
    scheduled = torch.optim.SGD(trainable(model), lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 1.0)
    with pytest.raises(BlobError, match="already has a scheduler"):
        attach(model, scheduled, kl_learning_rate=0.01)
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
    with pytest.raises(BlobError, match="no posterior parameters"):
        attach(model, other, kl_learning_rate=0.01)


def test_lora_fa_which_freezes_a_is_refused():
    model = make()
    optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-3)
    with pytest.raises(BlobError, match="A is frozen, so its posterior cannot be learned: LoRA-FA"):
        attach(model, optimizer)


def test_layers_that_the_network_does_not_use_are_named(caplog):
    """Their A gets no gradient from the NLL, and the KL alone would take it to the prior."""
    model = make()
    unused = model.base_model.model.bert.encoder.layer[1]
    unused.forward = lambda hidden, *args, **kwargs: hidden  # a network that skips a layer
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    attach(model, optimizer)
    with caplog.at_level("WARNING", "blob_hf"):
        nll_step(model, optimizer)
        nll_step(model, optimizer)
    assert len(caplog.records) == 1
    assert "does not use the LoRA of 2 layers (bert.encoder.layer.1.attention.self.query ...)" in caplog.text
