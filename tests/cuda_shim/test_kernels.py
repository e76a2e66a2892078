"""csrc/cuda on the CPU shim, launches and the Python bridge included, against float64."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import types

import cuda_cases as cases
import pytest
import shim_build
import torch

from ada2i_fast import Ada2I, BalancedAdam, cpu, cuda, optim
from ada2i_fast.cpu import balanced_adam as cpu_balanced_adam
from ada2i_fast.cuda import attention_mapping, balanced_adam, tensor_ring
from ada2i_fast.ops.balanced_adam import normals
from ada2i_fast.ops.dropout import keep_mask
from model_cases import small_config

pytestmark = pytest.mark.skipif(shim_build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def order():
    """Sets the order in which the threads of a block run."""
    with cases.shim(shim_build.compile_library()) as configure:
        yield configure


@pytest.mark.parametrize("op, case, mode", cases.CHECKS)
def test_against_float64(order, op, case, mode):
    order("ascending")
    first = cases.check(op, case, mode)
    # The order of threads may not matter, to the last bit; nor may a second run.
    for name in ("descending", "shuffled"):
        order(name, seed=3)
        again = cases.check(op, case, mode)
        for key, value in first.items():
            assert torch.equal(value, again[key]), f"{op}, {case}, {mode}: {key} differs when threads run {name}"


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank, lengths", [(5, (9, 30)), (12, (3, 0, 61))])
def test_semantics_with_linear_ring(order, mode, rank, lengths):
    """Every rank's place in every ring: the other order of contraction gives another result, so both are tried."""
    order("ascending")
    case = cases.Ring(rank, (8, 6, 5, 7), lengths)
    inputs = cases.ring_inputs(case, mode)
    inputs["ring"] = [[l for l in range(4) if l != j] for j in range(4)]
    plain, exact = (cases.ring_plain(inputs, dtype) for dtype in (cases.DTYPES[mode], torch.float64))
    with cases.kernels(mode):
        result = cases.ring_cuda(inputs)
    for name, value in result.items():
        cases.assert_close(name, mode, value, plain[name], exact[name])


@pytest.mark.parametrize("width", [1, 2, 3, 5, 64, 131])
@pytest.mark.parametrize("p", [0.0001, 0.5, 0.9])
def test_mask_is_keep_mask(order, width, p):
    order("ascending")
    inputs = cases.ring_inputs(cases.Ring(1, (width, width), (66,), dropout=p), "float32")
    for name in ("proj_weight", "proj_bias", "map_weight", "map_bias"):
        inputs[name] = [torch.zeros_like(t) for t in inputs[name]]
    inputs["x"] = [torch.ones_like(t) for t in inputs["x"]]        # so out = mask * beta / (1 - p)
    inputs["grad_out"] = [torch.ones_like(t) for t in inputs["x"]]
    inputs["grad_target"] = []
    with cases.kernels("float32"):
        result = cases.ring_cuda(inputs)
    for j in range(2):
        mask = keep_mask(inputs["seed"], j, 66, width, p)
        assert torch.equal(result[f"out[{j}]"] != 0, mask)
        assert torch.equal(result[f"grad x[{j}]"] != 0, mask)


def test_inputs_of_any_layout(order):
    """Transposed, strided and expanded tensors give what their contiguous copies give."""
    order("ascending")
    inputs = cases.ring_inputs(cases.Ring(3, (8, 5), (9, 12)), "float32")
    inputs["grad_out"] = [g[:1].expand_as(g) for g in inputs["grad_out"]]
    copies = {k: [t.clone(memory_format=torch.contiguous_format) for t in v]
              if isinstance(v, list) and v and isinstance(v[0], torch.Tensor) else v for k, v in inputs.items()}
    inputs["x"] = [t.t().contiguous().t() for t in inputs["x"]]
    inputs["map_weight"] = [t.repeat_interleave(2, 1)[:, ::2] for t in inputs["map_weight"]]
    inputs["offsets"] = inputs["offsets"].repeat_interleave(2)[::2]
    for name, value in cases.ring_cuda(inputs).items():
        assert torch.equal(value, cases.ring_cuda(copies)[name]), name


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("options", cases.SETTINGS)
@pytest.mark.parametrize("count", [1, 128, 300])
def test_settings(order, count, options, modulated):
    for name in cases.ORDERS:
        order(name, seed=2)
        cases.check_settings(count, modulated, options)


def test_settings_keep_what_is_not_finite(order):
    """A NaN among the gradients shows in the norm and in every factor, as it does in plain PyTorch."""
    order("ascending")
    measures, *rest = cases.settings_inputs(5)
    measures[3, 1] = math.nan
    settings, norm, _ = balanced_adam.settings(measures, *rest, **cases.SETTINGS[0])
    assert norm.isnan() and settings[:, 0].isnan().all()


@pytest.mark.parametrize("changes", [dict(noise="none"), dict(noise="gradient"), dict(noise="parameter", clip_order="after", weight_decay=0.1)])
def test_optimizer_on_the_kernels(order, monkeypatch, changes):
    """Four steps of BalancedAdam as on CUDA, beside the CPU's: the same seeds, so the same noise. The bound of
    tests/test_optim.py for each of the two; noise is known to 3e-6 of its deviation, which is 1 on gradients and lr on parameters."""
    if cpu.why_not():
        pytest.skip(cpu.why_not())
    order("descending")
    config = small_config("released", **{**dict(clip_norm=0.5), **changes})
    torch.manual_seed(1)
    models = [Ada2I(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [BalancedAdam(model, lr=1e-3) for model in models]
    ratio = {"t": torch.tensor(2.5), "a": torch.tensor(1.0), "v": torch.tensor(1.2)}
    bridge = types.SimpleNamespace(
        measure=lambda grads, backend: balanced_adam.measure(grads),
        settings=lambda *tensors, backend, **options: balanced_adam.settings(*tensors, **options),
        update=lambda *tensors, backend, **options: balanced_adam.update(*tensors, **options))
    g = torch.Generator().manual_seed(5)
    for step in range(4):
        grads = [torch.randn(p.shape, generator=g) for p in models[0].parameters()]
        for model, optimizer, ops in zip(models, optimizers, (optim.balanced_adam, bridge)):
            for p, grad in zip(model.parameters(), grads):
                p.grad = grad.clone()
            torch.manual_seed(step)
            with monkeypatch.context() as patch:
                patch.setattr(optim, "balanced_adam", ops)
                optimizer.step(ratio if step else None)
        torch.testing.assert_close(*(o.last_norm for o in optimizers), rtol=1e-6, atol=0)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        noise = {"none": 0.0, "gradient": 1e-3, "parameter": 1e-3}[config.noise] * 4 * 3e-6
        assert ((q - p).abs() <= 2 * (2 * 2.0 ** -24 * (40 * 1e-3 * 4 + 4 * p.abs()) + noise)).all(), name


def noise_of_update(seed, number, step, size):
    """theta, from 0 and without an update of its own, is the noise."""
    zeros = [[torch.zeros(size)] for _ in range(4)]
    settings = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    balanced_adam.update(*zeros, settings, [number], torch.tensor([seed, step]), 0.9, 0.999, 1e-8)
    return zeros[0][0]


@pytest.mark.parametrize("seed, number, step, size", [(5, 0, 0, 1), (-(2 ** 62), 7, 3, 9000), (2 ** 62, 2 ** 40, 2 ** 32 - 1, 4133)])
def test_noise_is_that_of_the_cpu(order, seed, number, step, size):
    """A function of seed, tensor, step and element. A logarithm near 1 leaves the radius near 0 an absolute error of 3e-6."""
    order("shuffled", seed=7)
    noise = noise_of_update(seed, number, step, size)
    torch.testing.assert_close(noise.double(), normals(torch.tensor(seed), number, step, size), rtol=0, atol=3e-6)
    if cpu.why_not() is None:
        native = cpu_balanced_adam.noise(torch.tensor([seed]), number, step, size)
        torch.testing.assert_close(noise, native, rtol=0, atol=3e-6)


def test_without_seed_there_is_no_noise(order):
    order("ascending")
    inputs = cases.adam_inputs(cases.Adam((70,), "parameter"), "float32")
    quiet = cases.adam_cuda({**inputs, "settings": inputs["settings"] * torch.tensor([1.0, 1, 1, 1, 0, 0])})
    for name, value in cases.adam_cuda({**inputs, "seed": None}).items():
        assert torch.equal(value, quiet[name]), name


def test_adam_refuses_what_it_cannot_trust(order):
    inputs = cases.adam_inputs(cases.Adam((70, 8), "parameter"), "float32")
    states, rest = [inputs[name] for name in cases.ADAM_TENSORS], (inputs["numbers"], inputs["seed"], 0.9, 0.999, 1e-8)
    for place, wrong, words in ((1, [inputs["grads"][0]], "grads: expected 2 tensors, got 1"),
                                (2, [inputs["grads"][0], torch.zeros(9)], r"exp_avg\[1\]: expected .*\[8\].*got .*\[9\]"),
                                (3, [inputs["grads"][0].double(), inputs["grads"][1]], r"exp_avg_sq\[0\]: .*got torch.float64"),
                                (0, [torch.zeros(140)[::2], inputs["grads"][1]], r"params\[0\]: expected contiguous .*got strided")):
        with pytest.raises(ValueError, match=words):
            balanced_adam.update(*states[:place], wrong, *states[place + 1:], inputs["settings"], *rest)
    with pytest.raises(ValueError, match="settings: expected contiguous torch.float64"):
        balanced_adam.update(*states, inputs["settings"].float(), *rest)
    with pytest.raises(ValueError, match="seed: "):
        balanced_adam.update(*states, inputs["settings"], inputs["numbers"], torch.tensor([1]), *rest[2:])
    with pytest.raises(ValueError, match="numbers: expected 2"):
        balanced_adam.update(*states, inputs["settings"], [1], *rest[1:])


def test_target_shares_the_attention(order):
    inputs = cases.ring_inputs(cases.Ring(3, (8, 5), (9,)), "float32")
    arguments = [inputs[n] for n in ("x", "offsets", "proj_weight", "proj_bias", "map_weight", "map_bias")]
    ring = [1, 0]
    result = tensor_ring.forward(*arguments, ring, 1.0, 0.0, 0.0, None, False)
    assert len(result) == 10 and result[2] is result[8] and result[3] is result[9]
    assert len(tensor_ring.forward(*arguments, ring, 1.0, 0.0, 0.0, None, False, False)) == 8
    gated = tensor_ring.forward(*arguments, ring, 1.0, 0.0, 0.0, None, True)
    assert torch.equal(gated[2], gated[0]) and not torch.equal(gated[2], gated[8])
    assert [tuple(t.shape) for t in gated[4:8]] == [(9, 12), (9, 12), (1, 3, 3), (1, 3, 3)]


def test_what_is_out_of_range_is_refused(order):
    inputs = cases.ring_inputs(cases.Ring(3, (8, 5), (9,), dropout=0.5), "float32")
    arguments = [inputs[n] for n in ("x", "offsets", "proj_weight", "proj_bias", "map_weight", "map_bias")]
    with pytest.raises(ValueError, match="seed"):
        tensor_ring.forward(*arguments, [1, 0], 1.0, 0.0, 0.5, None, False)
    with pytest.raises(ValueError, match="ring"):
        tensor_ring.forward(*arguments, [1], 1.0, 0.0, 0.0, None, False)
    with pytest.raises(ValueError, match="range"):
        tensor_ring.forward(*arguments, [1, 2], 1.0, 0.0, 0.0, None, False)
    with pytest.raises(ValueError, match="map_bias"):
        tensor_ring.forward(*arguments[:-1], [t[1:] for t in inputs["map_bias"]], [1, 0], 1.0, 0.0, 0.0, None, False)
    with pytest.raises(ValueError, match="ranks 1 to 32, not 33"):
        many = cases.ring_inputs(cases.Ring(33, (8, 5), (9,)), "float32")
        cases.ring_cuda(many)
    with pytest.raises(ValueError, match="1 to 8 modalities, not 9"):
        attention_mapping.forward(*([inputs["x"][0]] * 9 for _ in range(2)), [], [], [])
    with pytest.raises(ValueError, match="float64"):
        cases.ring_cuda({**inputs, **{n: [t.double() for t in inputs[n]] for n in (*cases.PARAMETERS, "grad_out", "grad_target")}})


def test_eight_modalities(order):
    order("shuffled", seed=5)
    case = cases.Ring(6, tuple(range(3, 11)), (20, 34), dropout=0.5, gated_target=True)
    inputs = cases.ring_inputs(case, "float32")
    plain, exact = cases.ring_plain(inputs, torch.float32), cases.ring_plain(inputs, torch.float64)
    with cases.kernels("float32"):
        for name, value in cases.ring_cuda(inputs).items():
            cases.assert_close(name, "float32", value, plain[name], exact[name])


def test_other_struct_is_refused(order):
    """A library built from other sources would read garbage; the size tells."""
    handle, args = cuda.library(), tensor_ring._Arguments()
    address, size = ctypes.addressof(args), ctypes.sizeof(args)
    assert handle.ada2i_cuda_tensor_ring_forward_scratch(address, size + 8) == -1
    error = handle.ada2i_cuda_tensor_ring_forward(address, size + 8, None)
    assert handle.ada2i_cuda_error_string(error) == b"invalid argument"


def test_reasons_for_not_serving(monkeypatch, tmp_path):
    assert tensor_ring.why_not("cuda", torch.float32, (300,) * 3, 11) is None
    assert "1 to 8 modalities, not 9" in attention_mapping.why_not("cuda", torch.float32, (300,) * 9, 1)
    assert "ranks 1 to 32, not 33" in tensor_ring.why_not("cuda", torch.float32, (300,), 33)
    assert torch.version.cuda or cuda.why_not()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "PATH", tmp_path / "libada2i_cuda.so")
    cuda.PATH.write_text("not a library")
    assert "does not load" in cuda._load.__wrapped__()


def test_sign_of_zero_is_zero(order):
    zeros = [torch.zeros(3, 5)]
    loss, sign = attention_mapping.forward(zeros, zeros, [torch.zeros(5, 5)], [torch.zeros(5)], [1.0])
    assert loss.item() == 0 and not sign.any()


def test_address_sanitizer():
    """No access outside a tensor, shared memory or a piece of scratch, in any case."""
    runtime = shim_build.sanitizer_runtime()
    if runtime is None:
        pytest.skip("the compiler has no AddressSanitizer runtime")
    library = shim_build.compile_library(address_sanitizer=True)
    environment = {**os.environ, "LD_PRELOAD": runtime, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                   "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    result = subprocess.run([sys.executable, cases.__file__, str(library)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout[-300:] + result.stderr[-4000:])
    assert result.stdout.count("\n") == sum(mode in cases.SANITIZED for _, _, mode in cases.CHECKS)
