"""Attention inside dialogues: the native op against the formula in float64, plain PyTorch against the same."""

from __future__ import annotations

import pytest
import torch

from afw_cases import assert_same_bits_with_threads
from ada2i_fast import cpu
from ada2i_fast.ops import dialogue_attention
from ada2i_fast.ops.dialogue_attention import dialogue_attention_seeded

native = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
SEED = torch.tensor([1 << 40])


def case(lengths, width, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(sum(lengths) * width)
    qkv, grad = torch.randn(sum(lengths), 3 * width, generator=g) * scale, torch.randn(sum(lengths), width, generator=g)
    return qkv.to(dtype), grad.to(dtype)


def run(function, qkv, grad):
    qkv = qkv.clone().requires_grad_()
    out = function(qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def compare(qkv, grad, lengths, heads, p, largest_score=0.0):
    """Error at most twice that of the formula in plain PyTorch of the same type, and some roundings of the largest element. A score of
    size S is a sum in some order, rounded to S 2^-24 at least, which becomes the relative error of its weight.
    """
    exact = run(lambda t: dialogue_attention_seeded(t, lengths, heads, p, SEED, 9), qkv.double(), grad.double())
    usual = run(lambda t: dialogue_attention_seeded(t, lengths, heads, p, SEED, 9), qkv, grad)
    got = run(lambda t: dialogue_attention(t, lengths, heads, dropout=p, seed=SEED, stream=9, backend="cpu"), qkv, grad)
    floor = (16 + largest_score) * 2.0 ** -24 + {torch.float32: 0, torch.float16: 2.0 ** -11, torch.bfloat16: 2.0 ** -8}[qkv.dtype]
    for g, u, e in zip(got, usual, exact):
        assert g.dtype == qkv.dtype
        assert (g - e).abs().max() <= 2 * (u - e).abs().max() + floor * e.abs().max()


CASES = [([7, 3, 5, 1], 1, 8), ([12, 13, 24, 25], 2, 57 * 2), ([48, 49], 3, 180), ([100], 2, 256), ([1, 1, 1], 2, 10), ([0, 5, 0, 2], 1, 1),
         ([33, 64, 31], 5, 5 * 60), ([110, 2], 1, 33)]


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("lengths,heads,width", CASES)
def test_against_float64(tier, lengths, heads, width, p, dtype):
    compare(*case(lengths, width, dtype=dtype), lengths, heads, p)


@native
def test_large_scores(tier):
    """Scores of some hundreds: without the maximum taken off, exp would overflow."""
    qkv, grad = case([20, 9], 32, scale=12.0)
    q, k = qkv[:, :64].view(29, 2, 2, 16).permute(1, 2, 0, 3)
    compare(qkv, grad, [20, 9], 2, 0.0, largest_score=(q @ k.transpose(1, 2) / 4).abs().max())


@native
def test_long_dialogue():
    """10,000 utterances; the score matrix of a head would take 400 MB. Rows checked against the formula."""
    n, width = 10_000, 16
    qkv, grad = case([n], width)
    out, grad_qkv = run(lambda t: dialogue_attention(t, [n], 1, backend="cpu"), qkv, torch.zeros(n, width).index_copy(0, torch.tensor([17, 9999]), grad[:2]))
    q, k, v = qkv.double().split(width, dim=1)
    weights = (q[[17, 9999]] @ k.t() / 4).softmax(1)
    torch.testing.assert_close(out[[17, 9999]].double(), weights @ v, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_qkv[:, 2 * width:].double(), weights.t() @ grad[:2].double(), rtol=1e-4, atol=1e-7)


@native
def test_threads_are_bitwise_equal():
    lengths = [60, 45, 30, 70]
    qkv, grad = case(lengths, 256)
    assert_same_bits_with_threads(lambda: run(lambda t: dialogue_attention(t, lengths, 4, dropout=0.2, seed=SEED, backend="cpu"), qkv, grad))


@native
def test_a_dialogue_does_not_depend_on_the_others():
    """Bit for bit, without dropout (the mask goes by the row of the batch)."""
    lengths = [7, 40, 3]
    qkv, _ = case(lengths, 96)
    whole = dialogue_attention(qkv, lengths, 6, backend="cpu")
    start = 0
    for n in lengths:
        assert torch.equal(dialogue_attention(qkv[start:start + n], [n], 6, backend="cpu"), whole[start:start + n])
        start += n


@native
def test_dropout_statistics():
    """With v = 1 an output is the kept share of the weights / (1 - p): mean 1 and a spread known for equal weights."""
    n, heads, p = 100, 4, 0.25
    qkv = torch.zeros(n, 3 * 8)
    qkv[:, 16:] = 1
    out = dialogue_attention(qkv, [n], heads, dropout=p, seed=SEED, backend="cpu")[:, ::2].double()
    spread = (p / (1 - p) / n) ** 0.5
    assert abs(out.mean().item() - 1) < 4.5 * spread / out.numel() ** 0.5
    assert out.std().item() == pytest.approx(spread, rel=4.5 / (2 * out.numel()) ** 0.5)
    assert torch.corrcoef(out.t()).fill_diagonal_(0).abs().max() < 4.5 / n ** 0.5          # heads


@native
def test_strided_and_empty():
    lengths = [5, 8]
    qkv, grad = case(lengths, 24)
    call = lambda t, g: run(lambda t_: dialogue_attention(t_, lengths, 3, dropout=0.3, seed=SEED, backend="cpu"), t, g)
    for a, b in zip(call(qkv.t().contiguous().t(), torch.cat([grad, grad], 1)[:, :24]), call(qkv, grad)):
        assert torch.equal(a, b)
    assert dialogue_attention(qkv[:0], [], 3, backend="cpu").shape == (0, 24)
    assert dialogue_attention(qkv[:0], [0, 0], 3, backend="cpu").shape == (0, 24)


@native
def test_second_derivatives():
    lengths = [4, 2]
    qkv, grad = case(lengths, 6)

    def second(function):
        t = qkv.clone().requires_grad_()
        first, = torch.autograd.grad((function(t) * grad).square().sum(), t, create_graph=True)
        return torch.autograd.grad(first.square().sum(), t)[0]

    torch.testing.assert_close(second(lambda t: dialogue_attention(t, lengths, 2, dropout=0.3, seed=SEED, backend="cpu")),
                               second(lambda t: dialogue_attention_seeded(t, lengths, 2, 0.3, SEED, 0)), rtol=1e-4, atol=1e-4)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    qkv, grad = case([4, 2], 6, dtype=dtype)
    ops = torch.ops.ada2i_fast
    out, logsum = ops.dialogue_attention_forward(qkv, [4, 2], None, 2, 0.3, SEED, 0, "cpu")
    for op, args in ((ops.dialogue_attention_forward, (qkv, [4, 2], None, 2, 0.3, SEED, 0, "cpu")),
                     (ops.dialogue_attention_backward, (grad, qkv, out, logsum, [4, 2], None, 2, 0.3, SEED, 0, "cpu"))):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("lengths,heads,width", CASES[:4])
def test_plain_torch(lengths, heads, width):
    qkv, grad = (t.double() for t in case(lengths, width))
    for got, e in zip(run(lambda t: dialogue_attention(t, lengths, heads, backend="torch"), qkv, grad),
                      run(lambda t: dialogue_attention_seeded(t, lengths, heads, 0.0, None, 0), qkv, grad)):
        torch.testing.assert_close(got, e, rtol=1e-10, atol=1e-12)


def test_refusals():
    qkv, _ = case([4, 2], 6)
    with pytest.raises(ValueError, match=r"lengths: expected them to sum to 6 \(the rows of qkv\), got 5"):
        dialogue_attention(qkv, [4, 1], 2)
    with pytest.raises(ValueError, match="heads: expected a divisor of the width, got 4"):
        dialogue_attention(qkv, [4, 2], 4)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_refused_lengths(backend):
    for lengths, words in (([9, -3], "lengths: expected no negative numbers, got -3"), ([4, 4], "lengths: expected them to sum to 6")):
        with pytest.raises(ValueError, match=words):
            dialogue_attention(torch.randn(6, 24), lengths, 2, backend=backend)
