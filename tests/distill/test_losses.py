"""Each loss and its gradient against NumPy from the formula, in float64: zeros, ties and masked keys included."""

import numpy as np
import pytest
import torch

from mmbivit.distill import (
    AttentionRankingLoss,
    BlockMSELoss,
    DirectionMatchingLoss,
    HardCrossEntropyLoss,
    SoftCrossEntropyLoss,
)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def unit(x):
    norm = np.sqrt((x**2).sum())
    return (x / norm, norm) if norm > 0 else (x, 1.0)


def hard_cross_entropy(s, t):
    target = np.zeros_like(s)
    target[np.arange(len(s)), [int(np.flatnonzero(row == row.max())[0]) for row in t]] = 1
    p = softmax(s)
    return -(target * np.log(p)).sum(1).mean(), (p - target) / len(s)


def soft_cross_entropy(s, t):
    p, target = softmax(s), softmax(t)
    return -(target * np.log(p)).sum(1).mean(), (p - target) / len(s)


def mean_square(s, t):
    """BiT's hidden states: the mean squared difference of one layer."""
    return ((s - t) ** 2).mean(), 2 * (s - t) / s.size


def direction(s, t):
    """``|| s / ||s|| - t / ||t|| ||``, and its gradient by s."""
    (ours, norm), (theirs, _) = unit(s), unit(t)
    way, distance = unit(ours - theirs)
    return (np.sqrt(((ours - theirs) ** 2).sum())), (way - ours * (ours * way).sum()) / norm


def direction_qkv(s, t):
    value, gradient = 0.0, np.zeros_like(s)
    for part in range(3):
        scale = np.sqrt(s.shape[-1])
        similar = [x[part] @ x[part].swapaxes(-1, -2) / scale for x in (s, t)]
        term, g = direction(*similar)
        value += term
        gradient[part] = (g + g.swapaxes(-1, -2)) @ s[part] / scale
    return value, gradient


def ranking(s, t):
    """Eq. 12 and 13 for maps, with the queries by a loop; mean over groups."""

    def psi(a):
        return np.stack([a[:, n] - a[:, n - 1 if n > 0 else a.shape[1] - 1] for n in range(a.shape[1])], axis=1)

    value, gradient = 0.0, np.zeros_like(s)
    for group in range(len(s)):
        difference = psi(t[group]) - psi(s[group])
        way, _ = unit(difference)
        value += np.sqrt((difference**2).sum()) / len(s)
        for n in range(s.shape[2]):  # A[n] is in psi[n], and with the other sign in psi[n + 1]
            gradient[group, :, n] = -(way[:, n] - way[:, (n + 1) % s.shape[2]]) / len(s)
    return value, gradient


def ranking_of_scores(s, t):
    p = softmax(s)
    value, g = ranking(p, softmax(t))
    return value, p * (g - (p * g).sum(-1, keepdims=True))


def logits(rng, case):
    s, t = rng.normal(size=(2, 4, 5))
    if case == "zeros":
        s[:2], t[1:3] = 0, 0
    if case == "ties":
        t = np.round(t)
        t[:, 3] = t[:, 1] = t.max() + 1
    return s, t


def features(rng, case):
    s, t = rng.normal(size=(2, 2, 6, 4))
    return {"zeros": (0 * s, t), "no teacher": (s, 0 * t), "ties": (t, t)}.get(case, (s, t))


def qkv(rng, case):
    s, t = rng.normal(size=(2, 3, 4, 2, 5, 3))
    if case == "zeros":
        s[1], t[2], s[0, 1] = 0, 0, 0
    return (t, t) if case == "ties" else (s, t)


def scores(rng, case):
    s, t = 2 * rng.normal(size=(2, 4, 2, 5, 5))
    if case == "zeros":
        s, t[0] = 0 * s, 0
    if case == "ties":  # one group is equal in both, and scores are often equal
        s, t = np.round(s), np.round(t)
        s[1] = t[1]
    if case == "masked":
        region = np.array([0, 0, 1, 1, 2])
        for x in (s, t):
            x[1::2, :, region[:, None] != region] = -np.inf
    return s, t


def weights(rng, case):
    """What the student selects, of equal share in a row, and the teacher's softmax."""
    s, t = scores(rng, case)
    selected = s >= s.max(-1, keepdims=True) - np.log(4)
    return selected / selected.sum(-1, keepdims=True), softmax(t)


CASES = [
    (HardCrossEntropyLoss(), hard_cross_entropy, logits, ["plain", "zeros", "ties"]),
    (SoftCrossEntropyLoss(), soft_cross_entropy, logits, ["plain", "zeros", "ties"]),
    (BlockMSELoss(reduction="sum"), mean_square, features, ["plain", "zeros", "ties"]),
    (DirectionMatchingLoss(), direction_qkv, qkv, ["plain", "zeros", "ties"]),
    (DirectionMatchingLoss(of="blocks"), direction, features, ["plain", "zeros", "no teacher", "ties"]),
    (AttentionRankingLoss(), ranking_of_scores, scores, ["plain", "zeros", "ties", "masked"]),
    (AttentionRankingLoss(maps="weights"), ranking, weights, ["plain", "zeros", "ties", "masked"]),
]
NAMED = [
    pytest.param(loss, formula, make, case, id=f"{loss.log_name}-{loss.tap}-{case}")
    for loss, formula, make, cases in CASES
    for case in cases
]


def layers(make, case, names):
    rng = np.random.default_rng(0)
    pairs = {name: make(rng, case) for name in names}
    student, teacher = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    return student, teacher


@pytest.mark.parametrize(("loss", "formula", "make", "case"), NAMED)
def test_value_and_gradient(loss, formula, make, case):
    student, teacher = layers(make, case, ["logits"] if loss.tap == "logits" else ["a", "b"])
    inputs = {name: torch.tensor(x, dtype=torch.float32, requires_grad=True) for name, x in student.items()}
    value = loss(inputs, {name: torch.tensor(x, dtype=torch.float32) for name, x in teacher.items()})
    assert value.shape == () and value.dtype == torch.float32
    value.backward()
    expected = {name: formula(student[name], teacher[name]) for name in student}
    # float32 of sums of up to a hundred terms of order 1, whose differences are divided by norms of order 1
    assert value.item() == pytest.approx(sum(term for term, _ in expected.values()), rel=1e-5, abs=1e-6)
    for name, (_, gradient) in expected.items():
        np.testing.assert_allclose(inputs[name].grad.numpy(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("loss", "make"), [(loss, make) for loss, _, make, _ in CASES])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_computed_in_float32(loss, make, dtype):
    """Under autocast of half the bits, too, where a product of matrices would lose them again."""
    student, teacher = (
        {name: torch.tensor(x).to(dtype) for name, x in side.items()} for side in layers(make, "plain", ["logits"])
    )
    exact = loss(*({name: x.float() for name, x in side.items()} for side in (student, teacher)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher), exact)


def test_what_does_not_change_a_loss():
    rng = np.random.default_rng(0)
    s, t = (dict(a=torch.tensor(x)) for x in qkv(rng, "plain"))
    value = DirectionMatchingLoss()(s, t)
    torch.testing.assert_close(DirectionMatchingLoss()(dict(a=7 * s["a"]), dict(a=t["a"] / 3)), value)

    s, t = (dict(a=torch.tensor(x)) for x in scores(rng, "plain"))
    value = AttentionRankingLoss()(s, t)
    twice = [dict(a=torch.cat([side["a"]] * 2)) for side in (s, t)]
    torch.testing.assert_close(AttentionRankingLoss()(*twice), value)  # the size of a batch
    # A map whose rows all have the same error has the teacher's order.
    even = dict(a=t["a"].softmax(-1) + 0.1 * torch.arange(5))
    assert AttentionRankingLoss(maps="weights")(even, dict(a=t["a"].softmax(-1))).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DirectionMatchingLoss(of="values"), "of='values' is unknown; allowed: 'qkv', 'blocks'"),
        (
            lambda: AttentionRankingLoss(maps="weight"),
            "maps='weight' is unknown; allowed: 'softmax', 'weights'; did you",
        ),
    ],
)
def test_an_unknown_option(make, message):
    with pytest.raises(ValueError, match=message):
        make()
