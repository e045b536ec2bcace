"""How samples are drawn: each alone is a standard normal, and averages vary as closed forms say."""

from itertools import pairwise

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from blob_hf.tuner.draws import standard_normal, standard_uniform
from blob_hf.tuner.layer import GaussianA
from blob_hf.tuner.sampling import DRAWS, Sampling
from blob_hf.utils.errors import BlobError

IN, RANK = 37, 4
MANY = 2000


def gaussian():
    return GaussianA(nn.Linear(IN, RANK, bias=False), "layer", 0.9, "square", "flipout")


@pytest.mark.parametrize("draw", DRAWS)
def test_each_sample_by_itself_is_a_draw_of_the_posterior(draw):
    """Marginals by Kolmogorov-Smirnov, and no correlation between coordinates or their squares, for every index."""
    for index in (0, 1, 2, 5, 130):
        noise = standard_normal("a", Sampling(1, 5, draw, first=index), (MANY, 6))[0]
        assert all(kstest(noise[:, j].numpy(), "norm").pvalue > 1e-4 for j in range(6)), (draw, index)
        for values in (noise, noise.square(), noise.abs()):
            assert torch.corrcoef(values.T).fill_diagonal_(0).abs().max() < 5 / MANY**0.5, (draw, index)
    uniform = torch.cat([standard_uniform("a", Sampling(5, seed, draw), (8,)) for seed in range(100)]).flatten()
    assert uniform.min() >= 0 and uniform.max() <= 1 and abs(uniform.mean() - 0.5) < 5 * (1 / 12 / 2000) ** 0.5


@pytest.mark.parametrize("draw", ["antithetic", "qmc"])
def test_paired_samples_lie_around_the_mean(draw):
    layer = gaussian()
    pairs = layer.draw(Sampling(6, 3, draw))
    torch.testing.assert_close((pairs[0::2] + pairs[1::2]) / 2, layer.weight.expand(3, -1, -1), atol=1e-6, rtol=0)
    assert torch.equal(layer.draw(Sampling(3, 3, draw, first=3)), pairs[3:])  # whatever else is drawn
    if draw == "antithetic":
        torch.testing.assert_close(pairs[0::2], layer.draw(Sampling(3, seed=3)))  # the first of each is independent


def test_evenly_spread_pairs_are_one_in_each_stratum():
    """Of 2^m pairs in a row, every coordinate has one distance from the mean in each of 2^m equal strata."""
    for first, pairs in ((0, 2), (0, 8), (8, 8), (0, 64), (64, 64)):
        noise = standard_normal("a", Sampling(2 * pairs, 1, "qmc", first=2 * first), (50,))[0::2]
        stratum = (torch.special.ndtr(noise.double().abs()) * 2 - 1).mul(pairs).floor()
        assert torch.equal(stratum.sort(0).values, torch.arange(pairs).double().unsqueeze(1).expand(pairs, 50))


@pytest.mark.parametrize("count", [3, 4])
def test_averages_of_a_linear_model_have_the_variance_of_the_closed_form(count):
    """The average of S samples has variance v / S, of pairs v / S^2 (S odd) or 0 (S even), and the right mean."""
    x = torch.randn(IN)
    v = x.square().sum().item()
    for draw in DRAWS:  # the rows of a weight are independent: each is a model of its own
        found = (standard_normal("a", Sampling(count, 3, draw), (MANY, IN)) @ x).mean(0)
        closed = v / count if draw == "iid" else v / count**2 if count % 2 else 0.0
        # five standard errors of a mean, and of a variance (sqrt(2 / n) of it)
        assert abs(found.mean()) <= 5 * (closed / MANY) ** 0.5 + 1e-6, draw
        assert abs(found.var() - closed) <= 5 * (2 / MANY) ** 0.5 * closed + 1e-10, draw


def test_averages_of_squares_have_the_variance_of_the_closed_form():
    """Var of mean_s eps_s^2: 2 / S, of S / 2 pairs 4 / S, of evenly spread ones that inside the strata alone."""
    edges = torch.linspace(0.5, 1, 5, dtype=torch.float64)
    grid = [torch.special.ndtri(a + (b - a) * (torch.arange(100_000) + 0.5) / 100_000) for a, b in pairwise(edges)]
    inside = sum(points.square().var().item() for points in grid) / 4**2
    for draw, closed in (("iid", 2 / 8), ("antithetic", 4 / 8), ("qmc", inside)):
        found = standard_normal("a", Sampling(8, 3, draw), (100_000,)).square().mean(0)
        assert found.mean().item() == pytest.approx(1, abs=5 * (closed / 100_000) ** 0.5), draw
        assert found.var().item() == pytest.approx(closed, rel=0.05), draw
    assert inside < 0.45 * 4 / 8


def test_draws_that_there_are_not_are_refused():
    with pytest.raises(BlobError, match="draw must be one of iid, antithetic, qmc, got 'sobol'"):
        Sampling(4, draw="sobol")
    with pytest.raises(BlobError, match="layers must be >= 1, got 0"):
        Sampling(4, layers=0)
    with pytest.raises(BlobError, match="tolerance must be > 0, got 0"):
        Sampling(4, tolerance=0)
    with pytest.raises(BlobError, match="a whole number or 'auto', got 'many'"):
        Sampling.of("many")
