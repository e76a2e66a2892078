"""The CUDA backend on a GPU: the cases of tests/cuda_shim, and what only a GPU can show. Run with -m gpu."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda_shim"))

import cuda_cases as cases  # noqa: E402
import test_afw_layer as layer  # noqa: E402

from ada2i_fast import Ada2I, BalancedAdam, cuda, node  # noqa: E402
from ada2i_fast.cuda import attention_mapping, balanced_adam, tensor_ring  # noqa: E402
from ada2i_fast.ops import afw_layer  # noqa: E402
from afw_cases import by_way_of  # noqa: E402
from model_cases import small_config  # noqa: E402

pytestmark = [pytest.mark.gpu]
DEVICE = "cuda"
each_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])


@pytest.fixture(params=["cuda in one call", "cuda by python", "triton"])
def backend(request, monkeypatch):
    """That of `afw_layer`, for tests that have no `each_backend`: CUDA's as one call (`node`), which then has to take what it gets, and by way of Python."""
    if request.param == "triton":
        yield "triton"
        return
    way = "python" if request.param == "cuda by python" else "node"
    if way == "node" and (reason := node.why_not()):
        pytest.skip(reason)
    with by_way_of(way, "cuda_afw_layer", monkeypatch):
        yield "cuda"


@pytest.fixture(autouse=True, scope="module")
def needs_library():
    if reason := cuda.why_not():
        pytest.skip(reason)


@pytest.mark.parametrize("op, case, mode", cases.CHECKS)
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


def test_cuda_graph(captured):
    """Both ops, forward and backward, captured once and replayed on new numbers."""
    inputs = cases.to(cases.ring_inputs(cases.Ring(11, (60, 37, 64), (20, 0, 50), dropout=0.5), "float32"), "cuda")
    mapping = cases.to(cases.mapping_inputs(cases.Mapping((60, 37), 70), "float32"), "cuda")

    def step():
        return [*cases.ring_cuda(inputs).values(), *cases.mapping_cuda(mapping).values()]

    graph, replayed = captured(step)
    for t in inputs["x"] + mapping["x"]:
        t.mul_(0.5)
    inputs["seed"].add_(1)
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(replayed, step(), strict=True):
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


def launches(call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if "ada2i" in e.key)


def test_launches():
    """As few as csrc/cuda says: 3 forward and 5 backward; 2 and 2 for the loss."""
    inputs = cases.to(cases.ring_inputs(cases.Ring(3, (8, 12), (9, 3), dropout=0.5), "float32"), "cuda")
    arguments = [inputs[n] for n in ("x", "offsets", "proj_weight", "proj_bias", "map_weight", "map_bias")]
    settings = [[1, 0], 0.7, 0.3, 0.5, inputs["seed"], False]
    mapping = cases.to(cases.mapping_inputs(cases.Mapping((8, 12), 12), "float32"), "cuda")
    saved = tensor_ring.forward(*arguments, *settings)[4:]
    loss_inputs = [mapping[n] for n in ("x", "target", "weight", "bias", "coefficient")]
    sign = attention_mapping.forward(*loss_inputs)[1:]

    assert launches(lambda: tensor_ring.forward(*arguments, *settings)) == 3
    assert launches(lambda: tensor_ring.backward(inputs["grad_out"], inputs["grad_target"], *arguments, saved, *settings)) == 5
    assert launches(lambda: attention_mapping.forward(*loss_inputs)) == 2
    assert launches(lambda: attention_mapping.backward(mapping["grad_loss"], mapping["x"], sign, mapping["weight"],
                                                       mapping["coefficient"])) == 2


# ---- a layer as one node


def on_device(drawn: dict) -> dict:
    return {name: [t.to(DEVICE) for t in tensors] for name, tensors in drawn.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*layer.DEVICE_CASES, layer.IEMOCAP])
def test_layer_is_the_two_ops(case, dtype, backend):
    """The CUDA kernels to the last bit. Triton may compile other code for what lies at other addresses, so no sign may hang on a bit."""
    if backend == "cuda":
        layer.assert_is_the_two_ops(case, on_device(layer.inputs(case, dtype)), backend)
    else:
        # Other code sums in another order. A gradient of a weight is a sum of 500 terms of size 1 and reaches some 50: 500 roundings of
        # 2^-24 of that are 1.5e-3 at worst. 16-bit numbers are stored between the kernels: if every term is off by 2^-8, half of it in the
        # mean, the sum is by sqrt(500) 2^-9 = 0.04, in its largest elements twice that.
        tolerance = dict(rtol=1e-4, atol=1e-3) if dtype == torch.float32 else dict(rtol=0.05, atol=0.1)
        layer.assert_is_the_two_ops(case, on_device(layer.decided(case, dtype)), backend, **tolerance)


@pytest.mark.parametrize("case", [layer.SMALL, layer.IEMOCAP], ids=["small", "iemocap"])
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=["one dtype", "float32 parameters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layer_against_float64(case, dtype, parameters, backend):
    drawn = layer.decided(case, dtype)
    given = drawn if parameters is None else layer.float32_parameters(drawn)
    found = {name: t.cpu() for name, t in layer.run(case, on_device(given), backend).items()}
    assert found["grad phi[0]"].dtype == given["phi"][0].dtype
    layer.assert_close(found, layer.run(case, drawn, "torch"), layer.run(case, drawn, "torch", torch.float64), dtype)


@each_backend
def test_opcheck(backend):
    case, drawn = layer.SMALL, on_device(layer.inputs(layer.SMALL, torch.float32))
    flat = [l for others in case.rings for l in others]
    common = (drawn["x"], layer.offsets(case).to(DEVICE), *(drawn[n] for n in layer.PARAMETERS[1:]))
    settings = (flat, case.scale, case.beta, case.dropout, case.options["seed"].to(DEVICE), False)
    for with_target in (True, False):
        torch.library.opcheck(torch.ops.ada2i_fast.tensor_ring_forward.default, (*common, *settings, with_target, backend))
    saved = torch.ops.ada2i_fast.tensor_ring_forward(*common, *settings, True, backend)[-3 * len(case.widths):]
    torch.library.opcheck(torch.ops.ada2i_fast.tensor_ring_backward.default,
                          (drawn["grad_out"], drawn["grad_target"], *common, saved, *settings, backend))
    four = [drawn[n] for n in ("x", "grad_target", "phi", "phi_bias")]
    torch.library.opcheck(torch.ops.ada2i_fast.attention_mapping_forward.default, (*four, "sum", backend))
    loss, *sign = torch.ops.ada2i_fast.attention_mapping_forward(*four, "sum", backend)
    torch.library.opcheck(torch.ops.ada2i_fast.attention_mapping_backward.default,
                          (torch.ones_like(loss), drawn["x"], sign, drawn["phi"], "mean", backend))


def layer_of(case: layer.Case, at: dict, backend: str):
    """A function of nothing: output and loss as a scalar, then all gradients. Everything is on the device before."""
    offsets, settings, flat = layer.offsets(case).to(DEVICE), layer.options(case, DEVICE), [t for n in layer.NAMES for t in at[n]]

    def value(x, offsets, weights, biases, rest):
        out, loss = afw_layer(x, offsets, weights, biases, *rest, backend=backend, **settings)
        return sum(t.square().sum() for t in out) + 100.0 * loss

    def step(value=value):
        weights, biases = ([part for t in at[name] for part in t.chunk(4)] for name in ("proj_weight", "proj_bias"))
        total = value(at["x"], offsets, weights, biases, [at[n] for n in layer.NAMES[3:]])
        return [total.detach(), *torch.autograd.grad(total, flat)]

    return step, value


@each_backend
def test_compiles_whole(backend):
    torch._dynamo.reset()
    step, value = layer_of(layer.SMALL, layer.leaves(on_device(layer.decided(layer.SMALL, torch.float32)), layer.NAMES), backend)
    for a, b in zip(step(torch.compile(value, fullgraph=True)), step()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients(backend):
    drawn, results = layer.decided(layer.SMALL, torch.float32), []
    for name, dtype in ((backend, torch.float32), ("torch", torch.float64)):
        at = layer.leaves(on_device(drawn), layer.NAMES, dtype)
        flat = [t for n in layer.NAMES for t in at[n]]
        out, loss = layer.call(layer.SMALL, at, name)
        first = torch.autograd.grad(sum(t.sin().sum() for t in out) + loss, flat, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), flat))
    for a, e in zip(*results):
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-3 * e.abs().max().item())


def test_layer_on_several_streams(backend):
    """Forward and backward of each on its own stream, at once: as one after the other."""
    at = [layer.leaves(on_device(layer.inputs(layer.with_options(layer.IEMOCAP, seed=i), torch.float32)), layer.NAMES) for i in range(3)]
    steps = [layer_of(layer.IEMOCAP, a, backend)[0] for a in at]
    expected = [step() for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    for _ in range(3):
        found = []
        for stream, step in zip(streams, steps):
            with torch.cuda.stream(stream):
                found.append(step())
        torch.cuda.synchronize()
        for got, wanted in zip(found, expected):
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_layer_in_a_cuda_graph(backend, captured):
    """Captured once, replayed on new numbers; nothing waits for the device. Triton's gradients of parameters are launches of their own
    there, with other code, which may add up the 500 rows in another order: 500 roundings of 2^-24 of the largest at worst."""
    at = layer.leaves(on_device(layer.inputs(layer.IEMOCAP, torch.float32)), layer.NAMES)
    step, _ = layer_of(layer.IEMOCAP, at, backend)
    graph, replayed = captured(step)
    with torch.no_grad():
        for t in at["x"]:
            t.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(replayed, step(), strict=True):
        assert (got - expected).abs().max() <= (0.0 if backend == "cuda" else 500 * 2.0 ** -24 * expected.abs().max())


# ---- the optimiser


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("options", cases.SETTINGS)
@pytest.mark.parametrize("count", [1, 128, 300])
def test_settings(count, options, modulated):
    cases.check_settings(count, modulated, options, "cuda")


def optimised(noise: str, device: str = "cuda") -> tuple[BalancedAdam, list[list[torch.Tensor]]]:
    """An optimizer, and four steps' gradients."""
    torch.manual_seed(1)
    model = Ada2I(small_config("released", noise=noise, clip_norm=0.5)).to(device)
    g = torch.Generator().manual_seed(5)
    grads = [[torch.randn(p.shape, generator=g).to(device) for p in model.parameters()] for _ in range(4)]
    return BalancedAdam(model, lr=1e-3), grads


def parameters(optimizer: BalancedAdam) -> list[torch.Tensor]:
    return optimizer.param_groups[0]["params"]


def ratio(device: str = "cuda") -> dict[str, torch.Tensor]:
    return {"a": torch.tensor(1.0, device=device), "t": torch.tensor(2.5, device=device), "v": torch.tensor(1.2, device=device)}


@pytest.mark.parametrize("noise", ["none", "gradient", "parameter"])
def test_optimizer_agrees_with_the_cpu(noise, monkeypatch):
    """The bound of tests/cuda_shim/test_kernels.py, and the same noise for the same seed."""
    monkeypatch.setattr(torch, "randint", lambda high, shape, device: torch.full(shape, 2 ** 60 + 12345, device=device))
    ends = []
    for device in ("cpu", "cuda"):
        optimizer, grads = optimised(noise, device)
        for step in range(4):
            for p, g in zip(parameters(optimizer), grads[step]):
                p.grad = g
            optimizer.step(ratio(device) if step else None)
        ends.append([p.detach().cpu() for p in parameters(optimizer)])
        state = optimizer.state_dict()["state"][0]
        assert state["step"].device.type == device and state["step"].dtype == torch.float32 and state["step"] == 4
    for p, q in zip(*ends):
        allowed = 2 * (2 * 2.0 ** -24 * (40 * 1e-3 * 4 + 4 * p.abs()) + (noise != "none") * 1e-3 * 4 * 3e-6)
        assert ((q - p).abs() <= allowed).all()


def test_optimizer_launches():
    optimizer, grads = optimised("gradient")
    for p, g in zip(parameters(optimizer), grads[0]):
        p.grad = g
    optimizer.step(ratio())
    assert launches(lambda: optimizer.step(ratio())) == 4          # two to measure, the settings, the update
    assert launches(lambda: balanced_adam.measure(grads[0])) == 2


@pytest.mark.parametrize("noise", ["none", "parameter"])
def test_optimizer_in_a_cuda_graph(noise):
    """Replays go on with the steps, the learning rate of the last refresh and other noise."""
    optimizer, grads = optimised(noise)
    static, rho = [g.clone() for g in grads[0]], ratio()
    for p, g in zip(parameters(optimizer), static):
        p.grad = g
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step(rho)
    torch.cuda.current_stream().wait_stream(side)
    start = [p.detach().clone() for p in parameters(optimizer)]
    state = {name: [optimizer.state[p][name].clone() for p in parameters(optimizer)] for name in ("step", "exp_avg", "exp_avg_sq")}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(rho)

    def run(step) -> list[list[torch.Tensor]]:
        for p, s in zip(parameters(optimizer), start):
            p.data.copy_(s)
        for name, values in state.items():
            for p, v in zip(parameters(optimizer), values):
                optimizer.state[p][name].copy_(v)
        found = []
        for i in range(1, 4):
            for t, g in zip(static, grads[i]):
                t.copy_(g)
            optimizer.param_groups[0]["lr"] = 1e-3 / i
            rho["t"].fill_(1.0 + i)
            optimizer.refresh()
            step()
            found.append([p.detach().clone() for p in parameters(optimizer)])
        assert all(optimizer.state[p]["step"] == 4 for p in parameters(optimizer))
        return found

    replayed, again, eager = run(graph.replay), run(graph.replay), run(lambda: optimizer.step(rho))
    for a, b, c in zip(replayed, again, eager):
        if noise == "none":
            assert all(torch.equal(p, q) for p, q in zip(a, c))
        else:
            assert not any(torch.equal(p, q) for p, q, parameter in zip(a, b, parameters(optimizer)) if parameter in encoder_set(optimizer))


def encoder_set(optimizer: BalancedAdam) -> set:
    return {p for owned in optimizer._encoders.values() for p in owned}
