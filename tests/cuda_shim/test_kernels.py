"""csrc/cuda on the CPU shim, launches and the Python bridge included, against float64."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import cuda_cases as cases
import pytest
import shim_build
import torch

from ada2i_fast import cuda
from ada2i_fast.cuda import attention_mapping, tensor_ring
from ada2i_fast.ops.dropout import keep_mask

pytestmark = pytest.mark.skipif(shim_build.compiler() is None, reason="no C++ compiler")

EACH_CASE = [(op, case) for op, (table, *_) in cases.OPS.items() for case in table]


@pytest.fixture(scope="module")
def order():
    """Sets the order in which the threads of a block run."""
    with cases.shim(shim_build.compile_library()) as configure:
        yield configure


@pytest.mark.parametrize("mode", cases.DTYPES)
@pytest.mark.parametrize("op, case", EACH_CASE)
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
    assert torch.cuda.is_available() or cuda.why_not()
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
    assert result.stdout.count("\n") == 2 * len(EACH_CASE)
