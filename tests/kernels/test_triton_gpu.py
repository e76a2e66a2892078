"""The encoders' Triton kernels on a GPU: the interpreter's cases, and what only a GPU can show. Run with -m gpu."""

from __future__ import annotations

import copy

import pytest
import torch

import encoder_cases as cases
from ada2i_fast import backends
from ada2i_fast.modules.encoder import TransformerEncoder
from ada2i_fast.ops import dialogue_attention, keep_mask
from ada2i_fast.ops.dropout import dropout_residual_norm, relu_dropout
from runs import SCRIPT, beyond, results

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu]

DEVICE = "cuda"
# Of the largest element; 16-bit types one unit in the last place.
FLOOR = {torch.float32: 16 * 2.0 ** -24, torch.float16: 2.0 ** -10, torch.bfloat16: 2.0 ** -7}

OPS = {
    "relu": lambda p: lambda *t: relu_dropout(*t, p=p, seed=seed(), stream=cases.STREAM, backend="triton"),
    "norm": lambda p: lambda *t: dropout_residual_norm(*t, p=p, eps=cases.EPS, seed=seed(), stream=cases.STREAM, backend="triton"),
    "attention": lambda lengths, heads, p: lambda qkv: dialogue_attention(qkv, lengths, heads, dropout=p, seed=seed(),
                                                                          stream=cases.STREAM, backend="triton"),
}


def seed():
    return torch.tensor([cases.SEED], device=DEVICE)


def run(op, tensors, grad, *settings):
    leaves = [t.to(DEVICE).requires_grad_() for t in tensors]
    out = OPS[op](*settings)(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(DEVICE))]


def check(op, tensors, grad, *settings):
    """Error against float64 at most twice that of plain PyTorch in the same dtypes, and a floor; the same bits every time."""
    found = run(op, tensors, grad, *settings)
    for name, a, again, b, c in zip(cases.NAMES[op], found, run(op, tensors, grad, *settings),
                                    cases.plain(op, tensors, grad, *settings), cases.exact(op, tensors, grad, *settings)):
        assert torch.equal(a, again), f"{op} {name}: two runs differ"
        error, usual = ((t.cpu().double() - c).abs().max().item() for t in (a, b))
        assert error <= 2 * usual + FLOOR[grad.dtype] * c.abs().max().item(), f"{op} {name}: {error}, plain {usual}"


def test_every_case_of_the_interpreter():
    """Kernels compiled, inside buffers full of NaN."""
    found = results(SCRIPT, "--device", "cuda", "--cases", "all")
    assert len(found) > 100
    wrong = [f"{case}: {check}" for case, checks in found.items() for check in beyond(checks)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("case", [*cases.FUSED.values(), *cases.SLOW_FUSED.values()], ids=[*cases.FUSED, *cases.SLOW_FUSED])
def test_fused(case):
    *arguments, p = case
    tensors, grad = cases.fused_inputs(*arguments)
    check("relu", tensors[:2], grad, p)
    check("norm", tensors, grad.to(tensors[2].dtype), p)


@pytest.mark.parametrize("case", [*cases.ATTENTION.values(), *cases.SLOW_ATTENTION.values()],
                         ids=[*cases.ATTENTION, *cases.SLOW_ATTENTION])
def test_attention(case):
    *arguments, p = case
    qkv, grad = cases.attention_inputs(*arguments)
    check("attention", [qkv], grad, *arguments[1:3], p)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths,heads,width", [([49, 110, 12, 60, 33, 70, 41, 55, 20, 50], 8, 1024), ([9, 33, 1, 4, 12, 7, 10, 3], 6, 342),
                                                 (list(range(1, 33)), 8, 512), ([10, 60, 7], 5, 1440)])
def test_dataset_sizes(dtype, lengths, heads, width):
    qkv, grad = cases.attention_inputs(dtype, lengths, heads, width)
    check("attention", [qkv], grad, lengths, heads, 0.5)
    tensors, grad = cases.fused_inputs(dtype, dtype, sum(lengths), width)
    check("relu", tensors[:2], grad, 0.5)
    check("norm", tensors, grad, 0.5)


def test_long_dialogue():
    """10,000 utterances, two rows of them against the formula."""
    n, width = 10_000, 32
    qkv, grad = (t.to(DEVICE) for t in cases.attention_inputs("float32", [n], 1, width))
    rows = torch.tensor([17, 9999], device=DEVICE)
    some = torch.zeros_like(grad).index_copy(0, rows, grad[:2])
    qkv.requires_grad_()
    out = dialogue_attention(qkv, [n], 1, backend="triton")
    grad_qkv, = torch.autograd.grad(out, qkv, some)
    q, k, v = qkv.detach().double().split(width, dim=1)
    weights = (q[rows] @ k.t() / width ** 0.5).softmax(1)
    torch.testing.assert_close(out[rows].detach().double(), weights @ v, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_qkv[:, 2 * width:].double(), weights.t() @ grad[:2].double(), rtol=1e-4, atol=1e-7)


def test_the_mask_is_keep_mask():
    ones = torch.ones(131, 77, device=DEVICE)
    out = relu_dropout(ones, torch.zeros(77, device=DEVICE), p=0.4, seed=seed(), stream=3, backend="triton")
    assert torch.equal(out != 0, keep_mask(seed(), 3, 131, 77, 0.4))


def test_encoder_takes_these_kernels():
    for op in ("dropout", "dialogue_attention"):
        assert backends.best(op, DEVICE, torch.float32, 30) == "triton"
    torch.manual_seed(0)
    plain = TransformerEncoder(30, 8, 5, 2, 64, 0.0, backend="torch").double()
    fused = copy.deepcopy(plain).float().to(DEVICE)
    fused.backend = "auto"
    x = torch.randn(23, 30)
    for a, b in zip(encoded(fused, x.to(DEVICE)), encoded(plain, x.double())):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-5)


def encoded(encoder, x):
    out = encoder(x, [20, 0, 3])
    return [out.detach(), *torch.autograd.grad(out.square().sum(), encoder.parameters())]


def step(inputs, lengths):
    from ada2i_fast.kernels import dialogue_attention, dropout

    qkv, grad, (x, bias, residual, weight, norm_bias) = inputs["qkv"], inputs["grad"], inputs["tensors"]
    out, *saved = dialogue_attention.forward(qkv, lengths, 2, 0.3, inputs["seed"], 0)
    y, mean, rstd = dropout.norm_forward(x, bias, residual, weight, norm_bias, 0.3, 1e-5, inputs["seed"], 2)
    z = dropout.relu_forward(x, bias, 0.3, inputs["seed"], 3)
    return [out, y, z, *dropout.relu_backward(grad, z, 0.3),
            *dropout.norm_backward(grad, x, bias, residual, weight, mean, rstd, 0.3, inputs["seed"], 2),
            dialogue_attention.backward(grad, qkv, out, *saved, lengths, 2, 0.3, inputs["seed"], 0)]


def step_inputs(rows):
    qkv, grad = cases.attention_inputs("float32", [rows], 2, 32)
    return {"qkv": qkv.to(DEVICE), "grad": grad.to(DEVICE), "seed": seed(),
            "tensors": [t.to(DEVICE) for t in cases.fused_inputs("float32", "float32", rows, 32)[0]]}


def test_no_synchronisation():
    """Not even for lengths that were not there before."""
    inputs = step_inputs(41)
    step(inputs, [20, 21])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs, [19, 22])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream():
    inputs, side = step_inputs(41), torch.cuda.Stream()
    expected = step(inputs, [18, 23])
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = step(inputs, [18, 23])
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_cuda_graph(captured):
    """Captured once, replayed on new numbers after many other batches; without a step before it, capture says so."""
    from ada2i_fast.kernels import dialogue_attention

    inputs, lengths = step_inputs(41), [17, 0, 24]
    graph, replayed = captured(lambda: step(inputs, lengths))
    for n in range(dialogue_attention.MOST_BATCHES + 1):
        dialogue_attention.dialogue_offsets([n, 1], torch.device(DEVICE, torch.cuda.current_device()))
    inputs["qkv"].mul_(0.5)
    inputs["tensors"][0].mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(inputs, lengths)))
    with pytest.raises(RuntimeError, match="warm-up"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step(inputs, [16, 25])
