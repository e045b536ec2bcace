"""The loss of distillation against the whole sum, and against a predictive that is known in closed form."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import expit

from blob_hf.distillation import kl_classes, kl_tokens, lumped


def test_over_classes_it_is_the_kl_divergence_and_missing_classes_count_nothing():
    torch.manual_seed(0)
    logits, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4).log_softmax(-1)
    expected = F.kl_div(logits.log_softmax(-1), teacher, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl_classes(logits, teacher), expected)
    assert kl_classes(teacher + 3.0, teacher).abs().max() < 1e-6  # logits of the predictive itself
    some = torch.tensor([[0.25, 0.75, 0.0]]).log()
    padded = torch.tensor([[0.3, -0.2, -1e9]], requires_grad=True)
    found = kl_classes(padded, some)
    torch.testing.assert_close(found, kl_classes(padded[:, :2], some[:, :2]))
    (gradient,) = torch.autograd.grad(found.sum(), padded)
    torch.testing.assert_close(gradient[0, :2], padded.detach()[0, :2].softmax(-1) - some[0, :2].exp())
    assert gradient[0, 2] == 0


def test_the_whole_vocabulary_gives_the_whole_kl_and_fewer_tokens_that_of_lumped_outcomes():
    torch.manual_seed(1)
    logits, teacher = 3 * torch.randn(6, 11, requires_grad=True), (2 * torch.randn(6, 11)).log_softmax(-1)
    logits.retain_grad()
    whole = F.kl_div(logits.log_softmax(-1), teacher, reduction="none", log_target=True).sum(-1)
    all_of_them = kl_tokens(logits, *lumped(teacher, 11))
    torch.testing.assert_close(all_of_them, whole)
    torch.testing.assert_close(
        torch.autograd.grad(all_of_them.sum(), logits, retain_graph=True)[0],
        torch.autograd.grad(whole.sum(), logits, retain_graph=True)[0],
    )
    torch.testing.assert_close(kl_tokens(logits, *lumped(teacher, 50)), whole)  # more than there are
    before = torch.zeros(6)
    for k in (1, 3, 10):
        p, q = teacher.exp().double(), logits.detach().double().softmax(-1)
        expected = []
        for row_p, row_q in zip(p, q, strict=True):  # by hand: k outcomes, and one of all others
            top = sorted(range(11), key=lambda i, row=row_p: -row[i])[:k]
            pairs = [(row_p[i], row_q[i]) for i in top]
            pairs.append((1 - sum(a for a, _ in pairs), 1 - sum(b for _, b in pairs)))
            expected.append(sum(a * math.log(a / b) for a, b in pairs))
        found = kl_tokens(logits, *lumped(teacher, k))
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2e-4, atol=1e-5)
        assert (found >= before - 1e-6).all() and (found <= whole + 1e-5).all()  # data processing
        before = found.detach()
    # the gradient is that of lumped outcomes: none among the others of a student that has them right together
    shuffled = teacher.clone()
    shuffled[0, teacher[0].argsort()[:2]] = teacher[0, teacher[0].argsort()[:2].flip(0)]
    assert kl_tokens(shuffled, *lumped(teacher, 3))[0].abs() < 1e-6


def test_a_student_trained_on_it_converges_to_the_predictive_of_a_bayesian_linear_model():
    """Logistic regression with w ~ N(m, S): the predictive of a logit N(mu, s^2) is a one-dimensional integral."""
    generator = np.random.default_rng(0)
    mean, root = np.array([1.5, -2.0]), np.array([[1.2, 0.0], [0.6, 0.9]])
    inputs = generator.normal(size=(7, 2))
    mu, std = inputs @ mean, np.linalg.norm(inputs @ root, axis=1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    predictive = (expit(mu[:, None] + std[:, None] * nodes) * weights).sum(1) / weights.sum()
    plug_in = expit(mu)
    assert np.abs(predictive - plug_in).max() > 0.1  # else there is nothing to learn
    samples = generator.normal(size=(20_000, 2)) @ root.T + mean
    sampled = expit(inputs @ samples.T)
    teacher = torch.from_numpy(np.log(np.stack([1 - sampled.mean(1), sampled.mean(1)], axis=1)))
    student = torch.from_numpy(np.stack([0 * mu, mu], axis=1)).float().requires_grad_()  # begins at the mean
    optimizer = torch.optim.LBFGS([student], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = kl_classes(student, teacher).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = student.detach().softmax(-1)[:, 1].numpy()
    np.testing.assert_allclose(found, predictive, atol=3 * 0.5 / math.sqrt(20_000))
    assert np.abs(found - predictive).max() < 0.2 * np.abs(plug_in - predictive).max()


@pytest.mark.parametrize("k", [1, 4])
def test_what_is_left_over_has_its_probability_even_where_it_is_tiny(k):
    teacher = torch.tensor([[0.0, -30.0, -31.0, -32.0, -60.0]]).log_softmax(-1)
    ids, top, rest = lumped(teacher, k)
    assert ids.dtype == torch.int32 and top.shape == (1, k)
    torch.testing.assert_close(rest, teacher[:, k:].logsumexp(-1))
    assert lumped(teacher, 5)[2].item() == -math.inf
    assert torch.isfinite(kl_tokens(torch.zeros(1, 5), *lumped(teacher, 5))).all()
