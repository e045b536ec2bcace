import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from blob_hf.trainer.kl.diagnosis import diagnose, fitting_gamma
from blob_hf.trainer.kl.schedule import KL_SCHEDULES, KLSchedule, kl_cycle_length
from blob_hf.tuner.kl import gaussian_kl, kl_gradient_mean, kl_gradient_rho
from blob_hf.tuner.layer import std_from_rho
from blob_hf.utils.errors import BlobError


def test_gaussian_kl_is_that_of_torch_distributions():
    mean, std = torch.randn(3, 5), torch.rand(3, 5) + 0.01
    expected = kl_divergence(Normal(mean, std), Normal(0.0, 0.2)).sum()
    torch.testing.assert_close(gaussian_kl(mean, std, 0.2), expected)


def test_gaussian_kl_is_zero_at_the_prior_and_positive_elsewhere():
    assert gaussian_kl(torch.zeros(4), torch.full((4,), 0.3), 0.3).item() == pytest.approx(0, abs=1e-6)
    assert gaussian_kl(torch.zeros(4), torch.full((4,), 0.31), 0.3) > 0


@pytest.mark.parametrize("parameterization", ["square", "softplus"])
@pytest.mark.parametrize("prior_std", [0.1, 0.5])
def test_gradients_are_those_of_finite_differences(parameterization, prior_std):
    mean = torch.randn(6, dtype=torch.float64)
    rho = torch.rand(6, dtype=torch.float64) + 0.1

    def kl(m, r):  # in double: gaussian_kl itself computes in float32
        std = std_from_rho(r, parameterization)
        return ((prior_std / std).log() + (std**2 + m**2) / (2 * prior_std**2) - 0.5).sum()

    h = 1e-6
    for i in range(6):
        e = torch.zeros(6, dtype=torch.float64)
        e[i] = h
        by_mean = (kl(mean + e, rho) - kl(mean - e, rho)) / (2 * h)
        by_rho = (kl(mean, rho + e) - kl(mean, rho - e)) / (2 * h)
        # central differences: error h^2 * third derivative, far below 1e-5
        assert kl_gradient_mean(mean, prior_std)[i] == pytest.approx(by_mean.item(), rel=1e-5, abs=1e-6)
        gradient = kl_gradient_rho(rho, prior_std, parameterization)[i]
        assert gradient == pytest.approx(by_rho.item(), rel=1e-5, abs=1e-6)


def test_gradient_of_a_zero_g_is_zero_not_infinite():
    assert kl_gradient_rho(torch.zeros(3), 0.2, "square").tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("num_examples", "gamma", "batch_size", "expected"),
    [(12460, 8, 16, 253), (12460, 12, 16, 73), (2490, 8, 32, 67), (100, 1e9, 100, 1), (10, 50, 10**6, 1)],
)
def test_cycle_length(num_examples, gamma, batch_size, expected):
    assert kl_cycle_length(num_examples, gamma, batch_size) == expected


def test_published_cycle_at_gamma_4_is_over_ten_thousand_steps():
    assert kl_cycle_length(12460, 4, 16) > 10_000


@pytest.mark.parametrize("cycle", [1, 2, 7, 60])
def test_geometric_is_blundells_ratio_of_big_integers(cycle):
    schedule = KLSchedule("geometric", cycle_steps=cycle)
    for step in range(1, 3 * cycle + 1):
        position = step % cycle or cycle
        assert schedule(step) == pytest.approx(2**position / (2 ** (cycle + 1) - 1), rel=1e-12)


@pytest.mark.parametrize("cycle", [1, 5, 2000])
def test_geometric_sums_to_one_less_the_missing_term_over_a_cycle(cycle):
    total = math.fsum(map(KLSchedule("geometric", cycle_steps=cycle), range(1, cycle + 1)))
    assert total == pytest.approx(1 - 2.0 ** -(cycle + 1) / (1 - 2.0 ** -(cycle + 1)), rel=1e-12)


def test_other_schedules():
    make = {"cycle_steps": 20, "num_examples": 400, "total_steps": 100, "weight": 0.3}
    assert KLSchedule("uniform", **make)(7) == 1 / 20
    assert KLSchedule("elbo", **make)(7) == 1 / 400
    assert KLSchedule("constant", **make)(7) == 0.3
    assert KLSchedule("none", **make)(7) == 0
    for name in ("linear", "cosine"):
        weights = [KLSchedule(name, **make)(step) for step in range(1, 41)]
        assert weights == sorted(weights)
        assert weights[9] == pytest.approx(0.5 / 20)  # half way up
        assert weights[19:] == pytest.approx([1 / 20] * 21)  # then uniform
    short = KLSchedule("linear", cycle_steps=1000, total_steps=10)
    assert short(10) == 1 / 1000  # the rise fits into the run


@pytest.mark.parametrize("name", KL_SCHEDULES)
def test_every_schedule_is_finite_and_not_negative_for_a_long_cycle(name):
    schedule = KLSchedule(name, cycle_steps=11_000, num_examples=12460, total_steps=1500, weight=0.1)
    assert all(0 <= schedule(step) < 1 for step in range(1, 1501))


def test_diagnosis_of_the_published_gamma_4_run_warns_with_a_gamma_that_fits():
    cycle = kl_cycle_length(12460, 4, 16)
    found = diagnose(KLSchedule("geometric", cycle, 12460, 1500), batch_size=16, gamma=4)
    assert found.cycles < 1 and found.total_weight == 0.0
    (warning,) = found.warnings
    fit = fitting_gamma(12460, 16, 1500)
    for part in (str(cycle), "1500", f"gamma >= {fit:g}"):
        assert part in warning
    assert kl_cycle_length(12460, fit, 16) <= 1500 < kl_cycle_length(12460, fit - 0.1, 16)


def test_diagnosis_of_a_run_that_completes_cycles_has_no_warning():
    found = diagnose(KLSchedule("geometric", 253, 12460, 1500), batch_size=16, gamma=8)
    assert found.warnings == []
    # 1500 = 5 * 253 + 235: five whole cycles and 2^-18 of a sixth
    assert found.total_weight == pytest.approx(math.floor(1500 / 253) + 2.0**-18, abs=1e-9)


def test_the_diagnosis_weighs_pi_with_the_learning_rate():
    schedule = KLSchedule("geometric", 50, 1000, 100)
    shape = [1 - t / 100 for t in range(100)]
    found = diagnose(schedule, batch_size=16, gamma=8, lr_scale=shape)
    assert found.exposure == pytest.approx(sum(schedule(t + 1) * shape[t] for t in range(100)))
    assert found.total_weight == pytest.approx(2.0) and found.warnings == []
    assert f"({found.exposure:.4g} times" in str(found)
    (warning,) = diagnose(
        KLSchedule("geometric", 1000, 1000, 1000), 16, 8, [1 - t / 1000 for t in range(1000)]
    ).warnings
    assert "hardly be applied" in warning and "where the learning rate is nearly 0" in warning


def test_no_gamma_fits_a_run_that_is_too_short():
    assert fitting_gamma(12460, 16, 3) is None
    (warning,) = diagnose(KLSchedule("geometric", 253, 12460, 3), batch_size=16, gamma=8).warnings
    assert "gamma >=" not in warning and "kl_cycle_steps <= 3" in warning


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_cycle_length(10, 0, 1), "gamma must be > 0, got 0"),
        (lambda: kl_cycle_length(10, -1, 1), "gamma must be > 0, got -1"),
        (lambda: kl_cycle_length(0, 8, 1), "num_examples"),
        (lambda: kl_cycle_length(12460, 0.01, 1), "gamma 0.01 is too small"),
        (lambda: KLSchedule("cyclic"), "kl_schedule must be one of geometric"),
        (lambda: KLSchedule("geometric", 0), "kl_cycle_steps must be >= 1"),
        (lambda: KLSchedule("constant", weight=-1), "kl_weight must be >= 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(BlobError, match=message):
        call()
