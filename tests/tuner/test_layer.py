"""Noise estimators against closed forms and many explicit draws; frozen samples against plain linear layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blob_hf.tuner.layer import GaussianA, rho_from_std, std_from_rho, std_to_save
from blob_hf.tuner.noise import NOISE_ESTIMATORS
from blob_hf.tuner.sampling import Sampling
from blob_hf.tuner.signs import flip_by_table, flip_sign_bits, random_bits
from blob_hf.utils.errors import BlobError

ROWS, TOKENS, IN, RANK = 2, 3, 37, 4
DRAWS = 20_000


def gaussian(noise="flipout", parameterization="square", name="layer", init_eps=0.9):
    return GaussianA(nn.Linear(IN, RANK, bias=False), name, init_eps, parameterization, noise)


@pytest.fixture
def parts():
    x = torch.randn(ROWS, TOKENS, IN)
    return x, torch.randn(RANK, IN), torch.rand(RANK, IN) + 0.1


@pytest.mark.parametrize("noise", NOISE_ESTIMATORS)
def test_mean_and_variance_are_the_closed_form(noise, parts):
    x, mean, std = parts
    draws = torch.stack([NOISE_ESTIMATORS[noise](x, mean, std) for _ in range(DRAWS)])
    variance = x.square() @ std.square().T
    # standard error of a mean is sqrt(var / draws), of a Gaussian's variance var * sqrt(2 / draws); 72 entries each
    # are tested at 5 standard errors (6 for flipout, whose marginal given the signs is the same Gaussian)
    assert ((draws.mean(0) - x @ mean.T).abs() < 5 * (variance / DRAWS).sqrt()).all()
    assert ((draws.var(0) / variance - 1).abs() < 6 * (2 / DRAWS) ** 0.5).all()


def test_the_closed_form_is_that_of_explicit_weight_draws(parts):
    x, mean, std = parts
    outputs = torch.stack([F.linear(x, mean + std * torch.randn(RANK, IN)) for _ in range(DRAWS)])
    variance = x.square() @ std.square().T
    assert ((outputs.var(0) / variance - 1).abs() < 6 * (2 / DRAWS) ** 0.5).all()


def test_what_rows_and_tokens_share(parts):
    """One token repeated: `shared` gives it one value, flipout and local independent ones."""
    x, mean, std = parts
    same = x[:1, :1].expand(2, 2, IN)
    shared = NOISE_ESTIMATORS["shared"](same, mean, std)
    torch.testing.assert_close(shared, shared[:1, :1].expand_as(shared))
    for noise in ("flipout", "local"):
        draws = torch.stack([NOISE_ESTIMATORS[noise](same, mean, std) for _ in range(DRAWS)]) - same @ mean.T
        flat = draws.flatten(1, 2)  # (draws, rows * tokens, rank)
        correlation = torch.corrcoef(flat[..., 0].T)
        off = correlation - torch.eye(4)
        assert off.abs().max() < 5 / DRAWS**0.5, noise  # standard error of a zero correlation: 1 / sqrt(draws)


def test_gradients_agree_in_expectation(parts):
    """dE[f(y)]/d(mean, std, x) for f = sum y^2: the closed form is 2 M x x', 2 std x^2 summed, and so on."""
    x, mean, std = (part.double() for part in parts)
    x, mean, std = x.requires_grad_(), mean.requires_grad_(), std.requires_grad_()
    expected = (F.linear(x, mean).square() + x.square() @ std.square().T).sum()  # E[y^2] = mean^2 + variance
    truth = torch.autograd.grad(expected, (x, mean, std))
    for noise, estimator in NOISE_ESTIMATORS.items():
        draws = [
            torch.autograd.grad(estimator(x, mean, std).square().sum(), (x, mean, std)) for _ in range(DRAWS // 10)
        ]
        for truth_part, *estimates in zip(truth, *draws, strict=True):
            stacked = torch.stack(estimates)
            error = (stacked.mean(0) - truth_part) / (stacked.std(0) / len(estimates) ** 0.5)
            # z-scores of 222 entries: 5 is beyond the largest of that many normals with probability > 0.999
            assert error.abs().max() < 5, noise


@pytest.mark.parametrize("noise", list(NOISE_ESTIMATORS))
def test_custom_backward_is_that_of_finite_differences(noise):
    x = torch.randn(2, 3, 33, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(4, 33, dtype=torch.float64, requires_grad=True)
    std = torch.rand(4, 33, dtype=torch.float64).requires_grad_()

    def fixed_noise(x, mean, std):
        torch.manual_seed(1)
        return NOISE_ESTIMATORS[noise](x, mean, std)

    assert torch.autograd.gradcheck(fixed_noise, (x, mean, std))


@pytest.mark.parametrize("noise", list(NOISE_ESTIMATORS))
def test_gradients_do_not_depend_on_autocast_around_the_backward_pass(noise):
    x, mean, std = torch.randn(64, 40, requires_grad=True), torch.randn(RANK, 40), torch.rand(RANK, 40)
    found = []
    for around in (False, True):
        torch.manual_seed(0)
        output = NOISE_ESTIMATORS[noise](x, mean, std).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            found += torch.autograd.grad(output, x)
    assert torch.equal(*found)


@pytest.mark.parametrize("noise", list(NOISE_ESTIMATORS))
@pytest.mark.parametrize("rows", [(0,), (2, 0)])
def test_no_rows_are_no_mistake(noise, rows):
    x = torch.randn(*rows, IN, requires_grad=True)
    output = NOISE_ESTIMATORS[noise](x, torch.randn(RANK, IN), torch.rand(RANK, IN))
    assert output.shape == (*rows, RANK)
    output.sum().backward()


def test_local_noise_of_an_all_zero_row_has_finite_gradients():
    x = torch.zeros(2, IN, requires_grad=True)
    NOISE_ESTIMATORS["local"](x, torch.randn(RANK, IN), torch.ones(RANK, IN)).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("scale", [300.0, 1e-3])
def test_local_noise_in_half_precision_neither_overflows_nor_hits_a_floor(scale):
    x = torch.full((4_000, 64), scale, dtype=torch.float16)
    std = torch.full((RANK, 64), 0.01)
    noise = NOISE_ESTIMATORS["local"](x, torch.zeros(RANK, 64, dtype=torch.float16), std).float()
    expected = scale * 0.01 * 8
    assert noise.std().item() == pytest.approx(expected, rel=0.05)  # 16,000 draws: standard error 0.6 %


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flip", [flip_sign_bits, flip_by_table])
def test_signs_are_fair_and_uncorrelated(dtype, flip):
    ones = torch.ones(8_000, 70, dtype=dtype)
    signs = flip(ones, random_bits(ones, 70)).float()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    standard_error = 8_000**-0.5
    assert signs.mean(0).abs().max() < 5 * standard_error
    assert (signs.T @ signs / 8_000 - torch.eye(70)).abs().max() < 5.5 * standard_error  # 2,415 pairs


@pytest.mark.parametrize("parameterization", ["square", "softplus"])
def test_std_and_rho_are_inverse(parameterization):
    std = torch.tensor([1e-5, 1e-3, 0.2, 1.0, 30.0])
    torch.testing.assert_close(
        std_from_rho(rho_from_std(std, parameterization), parameterization), std, rtol=1e-5, atol=0
    )


def test_a_saved_square_gives_back_the_same_g():
    g = torch.empty(1_000_000).uniform_(0.03, 0.05)
    assert torch.equal(rho_from_std(std_from_rho(g, "square"), "square"), g)


@pytest.mark.parametrize("parameterization", ["square", "softplus"])
def test_initial_stds_are_squares_of_a_uniform(parameterization):
    std = gaussian(parameterization=parameterization, init_eps=0.05).std.detach()
    assert std.min() >= 0.05**2 / 2 * 0.999 and std.max() <= 0.05**2 * 1.001
    # mean of G^2 for G ~ U(eps/sqrt2, eps) is eps^2 * (1 - 2^-1.5) / (3 * (1 - 2^-0.5)); G^2 lies in an interval of
    # eps^2 / 2, so its std is at most about 0.15 eps^2, and there are 148 draws
    expected = 0.05**2 * (1 - 2**-1.5) / (3 * (1 - 2**-0.5))
    assert std.mean() == pytest.approx(expected, abs=5 * 0.15 * 0.05**2 / 148**0.5)


def test_eval_mode_and_mean_only_are_the_plain_linear_layer():
    layer, x = gaussian(), torch.randn(5, IN)
    assert not torch.equal(layer(x), F.linear(x, layer.weight))
    layer.mean_only = True
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    layer.mean_only = False
    assert torch.equal(layer.eval()(x), F.linear(x, layer.weight))


def test_frozen_samples_are_plain_linear_layers_block_by_block():
    layer, x = gaussian(), torch.randn(3 * 5, 2, IN)
    draws = layer.draw(Sampling(3, seed=7))
    with layer.frozen_samples(Sampling(3, seed=7)):
        y = layer(x)
    for s in range(3):
        torch.testing.assert_close(y[5 * s : 5 * s + 5], F.linear(x[5 * s : 5 * s + 5], draws[s]))
    assert not layer.is_frozen_somewhere


def test_samples_are_draws_from_the_posterior():
    layer = gaussian()
    draws = layer.draw(Sampling(4_000, seed=0))
    z = (draws - layer.weight) / layer.std
    assert z.mean(0).abs().max() < 5 / 4_000**0.5
    assert (z.var(0) - 1).abs().max() < 5 * (2 / 4_000) ** 0.5
    assert torch.corrcoef(z[:, :, :8].flatten(1).T).fill_diagonal_(0).abs().max() < 5 / 4_000**0.5


def test_a_sample_depends_on_seed_index_and_name_only():
    layer = gaussian()
    before = torch.get_rng_state()
    draws = layer.draw(Sampling(5, seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(layer.draw(Sampling(2, seed=3, first=3)), draws[3:])
    assert not torch.equal(layer.draw(Sampling(1, seed=4))[0], draws[0])
    other = gaussian(name="other")
    other.load_state_dict(layer.state_dict())
    assert not torch.equal(other.draw(Sampling(1, seed=3))[0], draws[0])


def test_rows_that_are_not_sample_major_are_refused():
    layer = gaussian()
    with layer.frozen_samples(Sampling(3, seed=0)), pytest.raises(BlobError, match=r"3 equal blocks.*got 4 rows"):
        layer(torch.randn(4, IN))


@pytest.mark.parametrize("noise", NOISE_ESTIMATORS)
def test_bf16_autocast_keeps_the_posterior_in_float32(noise):
    layer = gaussian(noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(5, IN, requires_grad=True))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == layer.rho.grad.dtype == torch.float32
    assert torch.isfinite(layer.rho.grad).all() and layer.rho.grad.abs().sum() > 0


@pytest.mark.parametrize("noise", NOISE_ESTIMATORS)
def test_activation_recomputation_sees_the_same_noise(noise):
    layer, x = gaussian(noise), torch.randn(5, IN, requires_grad=True)

    def gradient(run):
        torch.manual_seed(5)
        layer.zero_grad()
        run(x).square().sum().backward()
        return layer.rho.grad.clone()

    plain = gradient(layer)
    recomputed = gradient(lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False))
    assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("parameterization", ["square", "softplus"])
def test_rho_survives_a_save_to_the_last_bit(parameterization):
    """Over all sizes that training may bring it to, from a std far below the prior to one far above."""
    generator = torch.Generator().manual_seed(0)
    rho = torch.cat([torch.empty(20_000).uniform_(-scale, scale, generator=generator) for scale in (1e-3, 0.1, 1, 20)])
    rho = rho.abs() if parameterization == "square" else rho  # the trainer keeps G positive
    saved = std_to_save(rho, parameterization)
    assert torch.equal(rho_from_std(saved, parameterization).float(), rho)
