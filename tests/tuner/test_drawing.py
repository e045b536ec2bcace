"""What a seed draws: a loop over single samples, in whatever order and threads it is drawn."""

import math
import threading

import pytest
import torch
from helpers.training import blob_bert

from blob_hf import Sampling
from blob_hf.tuner import draws
from blob_hf.tuner.draws import sample_generator, standard_normal
from blob_hf.tuner.in_flight import frozen_now
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.tuner.sampling import DRAWS


def by_a_loop(name, sampling, shape):
    drawn = []
    for index in sampling.indices:
        pair, sign = (index // 2, 1 - 2 * (index % 2)) if sampling.draw != "iid" else (index, 1)
        if sampling.draw == "qmc":
            eps = (math.sqrt(2) * torch.erfinv(draws._signed(name, sampling.seed, pair, shape))).float()
        else:
            eps = torch.randn(shape, generator=sample_generator(name, sampling.seed, pair))
        drawn.append(sign * eps)
    return torch.stack(drawn)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("shape", [(3,), (4, 33), (8, 64)])
@pytest.mark.parametrize("first", [0, 3])
def test_standard_normals(shape, first, draw):
    sampling = Sampling(5, seed=2, first=first, draw=draw)
    assert torch.equal(standard_normal("a layer", sampling, shape), by_a_loop("a layer", sampling, shape))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("draw", DRAWS)
def test_threads_draw_the_same(two_threads, monkeypatch, draw):
    model, drawers = blob_bert(), set()
    drawn, sampling = draws._drawn, Sampling(3, seed=1, draw=draw)

    def spy(*wanted):
        drawers.add(threading.current_thread())
        return drawn(*wanted)

    monkeypatch.setattr(draws, "_drawn", spy)
    with model.posterior_samples(sampling):
        for layer in gaussian_layers(model).values():
            expected = layer.weight + layer.std * by_a_loop(layer.name, sampling, layer.weight.shape)
            assert torch.equal(frozen_now(layer).weight, expected)
    assert drawers and threading.main_thread() not in drawers


@pytest.mark.parametrize("threads", [1, 2])
def test_layers_at_the_mean_are_not_drawn(two_threads, monkeypatch, threads):
    torch.set_num_threads(threads)
    model, asked, drawn = blob_bert(), [], draws._drawn
    monkeypatch.setattr(draws, "_drawn", lambda name, *wanted: asked.append(name) or drawn(name, *wanted))
    sampling = Sampling(4, seed=1, draw="antithetic", layers=1)
    with model.posterior_samples(sampling):
        for name, layer in gaussian_layers(model).items():
            frozen = frozen_now(layer).weight
            if ".layer.0." in name:
                assert frozen is None
            else:
                assert torch.equal(frozen, layer.weight + layer.std * by_a_loop(name, sampling, layer.weight.shape))
    assert sorted(asked) == sorted(name for name in gaussian_layers(model) if ".layer.0." not in name) != []
