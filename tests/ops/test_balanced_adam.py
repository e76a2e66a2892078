"""The native multi-tensor update against float64, and the distribution of its noise."""

from __future__ import annotations

import math

import pytest
import torch

from afw_cases import assert_same_bits_with_threads
from ada2i_fast import cpu
from ada2i_fast.ops import balanced_adam as op

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
SEED = torch.tensor([0x123456789ABCDEF])
SEED_AND_STEP = torch.tensor([0x123456789ABCDEF, 7])
SIZES = (1, 5, 31, 33, 16384, 16385, 50001)


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    p, grad, m, v = ([torch.randn(n, generator=g) for n in SIZES] for _ in range(4))
    return [p, [x * 0.1 + 0.05 for x in grad], [x * 0.01 for x in m], [x.square() * 1e-3 for x in v]]


def settings(noise_on: str | None):
    g = torch.Generator().manual_seed(1)
    s = torch.rand(len(SIZES), 6, generator=g, dtype=torch.float64) * torch.tensor([1.0, 0.1, 1e-2, 2.0, 0.3, 0.3])
    for column, name in ((4, "gradient"), (5, "parameter")):
        if noise_on != name:
            s[:, column] = 0
    return s


def arguments(noise_on):
    return settings(noise_on), list(range(3, 3 + len(SIZES))), SEED_AND_STEP if noise_on else None, 0.9, 0.999, 1e-8


@pytest.mark.parametrize("noise_on", [None, "gradient", "parameter"])
def test_update_against_float64(tier, noise_on):
    """Not more than twice the error of the formula in float32 torch, or some roundings of the largest element."""
    exact = [[t.double() for t in kind] for kind in tensors()]
    usual, native = tensors(), tensors()
    op.update_torch(*exact, *arguments(noise_on))
    op.update_torch(*usual, *arguments(noise_on))
    op.update(*native, arguments(noise_on)[0], **dict(zip(("numbers", "seed", "beta1", "beta2", "eps"), arguments(noise_on)[1:])))
    # A normal is known to 3e-6: the radius near 0 has the absolute error of a logarithm near 1.
    noise_error = 3e-6 * settings(noise_on)[:, 4:].sum(1)
    for kind in (0, 2, 3):
        for got, u, e, n in zip(native[kind], usual[kind], exact[kind], noise_error):
            assert (got - e).abs().max() <= 2 * (u - e).abs().max() + 4 * 2.0 ** -24 * e.abs().max() + n
    assert all(torch.equal(a, b) for a, b in zip(native[1], tensors()[1]))          # gradients are only read


@pytest.mark.parametrize("noise_on", [None, "gradient"])
def test_modulate_against_float64(tier, noise_on):
    usual, native = tensors()[1], tensors()[1]
    exact = [t.double() for t in usual]
    s, numbers, seed = arguments(noise_on)[:3]
    op.modulate_torch(exact, s, numbers, seed)
    op.modulate_torch(usual, s, numbers, seed)
    op.modulate(native, s, numbers=numbers, seed=seed)
    for got, u, e, n in zip(native, usual, exact, 3e-6 * s[:, 4]):
        assert (got - e).abs().max() <= 2 * (u - e).abs().max() + 4 * 2.0 ** -24 * e.abs().max() + n


def test_measure(tier):
    grads = [*tensors()[1], torch.randn(20000) * 1e-3 + 100.0, torch.zeros(3)]      # a mean far above the spread
    got, exact = op.measure(grads), op.measure_torch(grads)
    torch.testing.assert_close(got[:, 0], exact[:, 0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got[:, 1], exact[:, 1], rtol=2e-6, atol=1e-12)


def test_noise_is_the_documented_one(tier):
    from ada2i_fast.cpu import balanced_adam as native

    for number, step, size in ((0, 0, 1), (7, 3, 1000), (200, 10 ** 6, 33)):
        torch.testing.assert_close(native.noise(SEED, number, step, size).double(), op.normals(SEED, number, step, size),
                                   rtol=0, atol=3e-6)


def test_does_not_depend_on_threads():
    def run():
        data = tensors()
        op.update(*data, settings("gradient"), numbers=range(len(SIZES)), seed=SEED_AND_STEP, beta1=0.9, beta2=0.999, eps=1e-8)
        return [*data[0], *data[2], *data[3], op.measure(data[1])]

    assert_same_bits_with_threads(run)


# ---- distribution: 200,000 normals, bounds of 4.5 standard errors

N = 200_000


def noise(seed=SEED, number=1, step=1, size=N):
    from ada2i_fast.cpu import balanced_adam as native

    return native.noise(seed, number, step, size).double()


def test_moments():
    z = noise()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z ** power).mean().item() - mean) < 4.5 * (variance / N) ** 0.5


def test_distribution_function():
    """Kolmogorov and Smirnov's statistic, at a level of 1e-5."""
    z = noise().sort().values
    expected = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    places = torch.arange(N, dtype=torch.float64) / N
    statistic = torch.maximum((expected - places).abs(), (expected - places - 1 / N).abs()).max().item()
    assert statistic < math.sqrt(-0.5 * math.log(1e-5 / 2) / N)


def test_tails():
    z = noise(size=1_000_000).abs()
    for edge in (2.0, 3.0, 4.0):
        expected = 1e6 * math.erfc(edge / math.sqrt(2))
        assert abs((z > edge).sum().item() - expected) < 4.5 * expected ** 0.5
    assert z.max() < 6.7


def test_independence():
    z = noise()
    others = [noise(number=2), noise(step=2), noise(seed=SEED + 1), noise(seed=SEED + (1 << 32))]
    others += [z.roll(lag) for lag in (1, 2, 4, 15, 16, 17, 32)]
    for other in others:
        for power in (1, 2):                                    # of the values, and of their squares: shared radii would show
            a, b = z ** power, other ** power
            assert abs(((a - a.mean()) * (b - b.mean())).mean().item()) / (a.std() * b.std()).item() < 4.5 / N ** 0.5


def test_an_element_does_not_depend_on_the_size():
    assert torch.equal(noise(size=1000)[:77], noise(size=77))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck(backend):
    p, g, m, v = ([t[:40].clone() for t in kind] for kind in tensors())
    ops = torch.ops.ada2i_fast
    torch.library.opcheck(ops.balanced_adam_measure, (g, backend), test_utils=("test_schema", "test_faketensor"))
    for noise_on in (None, "gradient", "parameter"):
        torch.library.opcheck(ops.balanced_adam_update, (p, g, m, v, *arguments(noise_on), backend),
                              test_utils=("test_schema", "test_faketensor"))


def test_refused_shapes():
    one, settings = torch.zeros(5), torch.zeros(2, 6, dtype=torch.float64)
    options = dict(seed=None, beta1=0.9, beta2=0.99, eps=1e-8)
    for place, name in enumerate(("grads", "exp_avg", "exp_avg_sq"), 1):
        tensors = [[one.clone(), one.clone()] for _ in range(4)]
        tensors[place][1] = torch.zeros(4)
        with pytest.raises(ValueError, match=rf"{name}\[1\]: expected \[5\] on cpu, got \[4\]"):
            op.update(*tensors, settings, numbers=[1, 2], **options)
    with pytest.raises(ValueError, match=r"settings: expected \[2, 6\]"):
        op.update(*[[one, one]] * 4, settings[:1], numbers=[1, 2], **options)
    with pytest.raises(ValueError, match="numbers: expected 2, one for each tensor, got 1"):
        op.update(*[[one, one]] * 4, settings, numbers=[1], **options)
    with pytest.raises(ValueError, match=r"settings: expected \[2, 6\]"):
        op.modulate([one, one], settings[:1], numbers=[1, 2], seed=None)
