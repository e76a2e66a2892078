"""The CUDA backend on a GPU: the cases of tests/cuda_shim, and what only a GPU can show. Run with -m gpu."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda_shim"))

import cuda_cases as cases  # noqa: E402

from ada2i_fast import cuda  # noqa: E402
from ada2i_fast.cuda import attention_mapping, tensor_ring  # noqa: E402

pytestmark = [pytest.mark.gpu]

EACH_CASE = [(op, case) for op, (table, *_) in cases.OPS.items() for case in table]


@pytest.fixture(autouse=True, scope="module")
def needs_library():
    if reason := cuda.why_not():
        pytest.skip(reason)


@pytest.mark.parametrize("mode", cases.DTYPES)
@pytest.mark.parametrize("op, case", EACH_CASE)
def test_against_float64(op, case, mode):
    first, again = (cases.check(op, case, mode, "cuda") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, again[name]), f"{name}: two runs differ"


# D and R of the three datasets, rows of a batch of each; and one dialogue of 10,000 rows.
@pytest.mark.parametrize("mode", cases.DTYPES)
@pytest.mark.parametrize("width, rank, lengths", [
    (300, 11, (49, 110, 12, 60, 33, 70, 41, 55, 20, 50)), (200, 6, (9, 33, 1, 4, 12, 7, 10, 3, 8, 9)),
    (500, 10, tuple(range(1, 33))), (64, 11, (10_000, 3)),
])
def test_dataset_sizes(mode, width, rank, lengths):
    case = cases.Ring(rank, (width,) * 3, lengths, dropout=0.5, gated_target=True)
    inputs = cases.ring_inputs(case, mode)
    inputs["proj_weight"] = [t / 2 for t in inputs["proj_weight"]]
    plain, exact = cases.ring_plain(inputs, cases.PLAIN[mode]), cases.ring_plain(inputs, torch.float64)
    with cases.kernels(mode):
        for name, value in cases.ring_cuda(cases.to(inputs, "cuda")).items():
            cases.assert_close(name, mode, value.cpu(), plain[name], exact[name])


def test_shim_and_gpu_agree_on_the_mask():
    """Bit for bit: what is dropped is a matter of integers."""
    from ada2i_fast.ops.dropout import keep_mask

    inputs = cases.ring_inputs(cases.Ring(1, (131, 64), (66,), dropout=0.5), "float32")
    for name in ("proj_weight", "proj_bias", "map_weight", "map_bias"):
        inputs[name] = [torch.zeros_like(t) for t in inputs[name]]
    inputs["x"] = [torch.ones_like(t) for t in inputs["x"]]
    result = cases.ring_cuda(cases.to(inputs, "cuda"))
    for j, width in enumerate((131, 64)):
        assert torch.equal(result[f"out[{j}]"].cpu() != 0, keep_mask(inputs["seed"], j, 66, width, 0.5))


def test_cuda_graph():
    """Both ops, forward and backward, captured once and replayed on new numbers."""
    inputs = cases.to(cases.ring_inputs(cases.Ring(11, (60, 37, 64), (20, 0, 50), dropout=0.5), "float32"), "cuda")
    mapping = cases.to(cases.mapping_inputs(cases.Mapping((60, 37), 70), "float32"), "cuda")

    def step():
        return [*cases.ring_cuda(inputs).values(), *cases.mapping_cuda(mapping).values()]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in inputs["x"] + mapping["x"]:
        t.mul_(0.5)
    inputs["seed"].add_(1)
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


def test_runs_on_the_current_stream():
    """Work queued behind a slow kernel on another stream sees that kernel's result."""
    inputs = cases.to(cases.ring_inputs(cases.Ring(3, (64, 64), (500,)), "float32"), "cuda")
    expected = cases.ring_cuda(inputs)
    clean = [t.clone() for t in inputs["x"]]
    for t in inputs["x"]:
        t.fill_(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for t, c in zip(inputs["x"], clean):
            t.copy_(c)
        result = cases.ring_cuda(inputs)
    side.synchronize()
    for name, value in expected.items():
        assert torch.equal(value, result[name]), name


def test_launches():
    """As few as csrc/cuda says: 3 forward and 5 backward; 2 and 2 for the loss."""
    inputs = cases.to(cases.ring_inputs(cases.Ring(3, (8, 12), (9, 3), dropout=0.5), "float32"), "cuda")
    arguments = [inputs[n] for n in ("x", "offsets", "proj_weight", "proj_bias", "map_weight", "map_bias")]
    settings = [[1, 0], 0.7, 0.3, 0.5, inputs["seed"], False]
    mapping = cases.to(cases.mapping_inputs(cases.Mapping((8, 12), 12), "float32"), "cuda")
    saved = tensor_ring.forward(*arguments, *settings)[4:]
    loss_inputs = [mapping[n] for n in ("x", "target", "weight", "bias", "coefficient")]
    sign = attention_mapping.forward(*loss_inputs)[1:]

    def launches(call) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sum(e.count for e in profile.key_averages() if "ada2i" in e.key)

    assert launches(lambda: tensor_ring.forward(*arguments, *settings)) == 3
    assert launches(lambda: tensor_ring.backward(inputs["grad_out"], inputs["grad_target"], *arguments, saved, *settings)) == 5
    assert launches(lambda: attention_mapping.forward(*loss_inputs)) == 2
    assert launches(lambda: attention_mapping.backward(mapping["grad_loss"], mapping["x"], sign, mapping["weight"],
                                                       mapping["coefficient"])) == 2
