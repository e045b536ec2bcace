"""What a seed draws: a loop over torch's own normals, in whatever order and threads it is drawn."""

import threading

import pytest
import torch
from helpers.training import blob_bert

from blob_hf import Sampling
from blob_hf.tuner import sampled
from blob_hf.tuner.in_flight import frozen_now
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.tuner.sampled import sample_generator, standard_normal


def by_a_loop(name, sampling, shape):
    drawn = []
    for index in sampling.indices:
        pair, sign = (index // 2, 1 - 2 * (index % 2)) if sampling.antithetic else (index, 1)
        drawn.append(sign * torch.randn(shape, generator=sample_generator(name, sampling.seed, pair)))
    return torch.stack(drawn)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("shape", [(3,), (4, 33), (8, 64)])
@pytest.mark.parametrize("first", [0, 3])
def test_standard_normals(shape, first, antithetic):
    sampling = Sampling(5, seed=2, first=first, antithetic=antithetic)
    assert torch.equal(standard_normal("a layer", sampling, shape), by_a_loop("a layer", sampling, shape))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("antithetic", [False, True])
def test_threads_draw_the_same(two_threads, monkeypatch, antithetic):
    model, drawers = blob_bert(), set()
    drawn, sampling = sampled._drawn, Sampling(3, seed=1, antithetic=antithetic)

    def spy(*wanted):
        drawers.add(threading.current_thread())
        return drawn(*wanted)

    monkeypatch.setattr(sampled, "_drawn", spy)
    with model.posterior_samples(sampling):
        for layer in gaussian_layers(model).values():
            expected = layer.weight + layer.std * by_a_loop(layer.name, sampling, layer.weight.shape)
            assert torch.equal(frozen_now(layer).weight, expected)
    assert drawers and threading.main_thread() not in drawers
