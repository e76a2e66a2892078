"""Inputs and yardstick of the encoder ops in Triton: for the interpreter (triton_cases.py) and for a GPU (test_triton_gpu.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ada2i_fast.ops.dialogue_attention import dialogue_attention_seeded
from ada2i_fast.ops.dropout import dropout_norm_torch, relu_dropout_torch

# name: (dtype of x, dtype of the rest, rows, width, p)
FUSED = {
    "fused-one-row": ("float32", "float32", 1, 3, 0.0),
    "fused-57": ("float32", "float32", 37, 57, 0.3),
    "fused-300": ("float32", "float32", 20, 300, 0.5),
    "fused-1024": ("float32", "float32", 5, 1024, 0.1),
    "fused-two-blocks": ("float32", "float32", 3, 2560, 0.3),
    "fused-many-rows": ("float32", "float32", 600, 16, 0.3),
    "fused-float16": ("float16", "float16", 19, 70, 0.3),
    "fused-bfloat16": ("bfloat16", "bfloat16", 19, 70, 0.3),
    "fused-autocast": ("bfloat16", "float32", 19, 70, 0.3),
}
SLOW_FUSED = {f"fused-{d}-{dtype}": (dtype, dtype, 11, d, 0.3) for dtype in ("float32", "float16", "bfloat16")
              for d in (1440, 6 * 57, 512, 600, 6144) if (d, dtype) != (6144, "float16")}
# name: (dtype, lengths, heads, width, p)
ATTENTION = {
    "attention-head-1": ("float32", [0, 5, 0, 2, 1], 1, 1, 0.4),
    "attention-short": ("float32", [7, 3, 0, 5, 1], 2, 16, 0.4),
    "attention-head-57": ("float32", [12, 33, 24], 2, 114, 0.0),
    "attention-head-60": ("float32", [33, 64, 31], 3, 180, 0.3),
    "attention-two-blocks": ("float32", [20, 3], 2, 200, 0.3),
    "attention-one-dialogue": ("float32", [70], 1, 8, 0.2),
    "attention-float16": ("float16", [20, 3, 40], 2, 40, 0.3),
    "attention-float16-128": ("float16", [9, 18], 1, 150, 0.0),
    "attention-bfloat16": ("bfloat16", [20, 3, 40], 2, 40, 0.3),
}
SLOW_ATTENTION = {
    "attention-many": ("float32", [n % 4 for n in range(200)], 1, 16, 0.3),
    "attention-long": ("float32", [330, 1], 1, 16, 0.3),
    **{f"attention-{head}-{dtype}": (dtype, [1, 0, 18, 40, 5], 2, 2 * head, 0.3)
       for head in (288, 128, 64, 60, 57) for dtype in ("float32", "float16", "bfloat16") if (head, dtype) != (288, "bfloat16")},
}

EPS = 1e-5
STREAM = 5
SEED = -0x123456789ABCDEF


def device() -> torch.device:
    """Where tensors are made, with its number."""
    return torch.empty(0).device


def generator() -> torch.Generator:
    return torch.Generator(device())


def fused_inputs(x_type: str, other: str, rows: int, width: int) -> tuple[list[Tensor], Tensor]:
    """x, bias, residual, weight, norm_bias, and the gradient of the result."""
    g = generator().manual_seed(rows * width)
    shapes = [(rows, width), (width,), (rows, width), (width,), (width,), (rows, width)]
    *tensors, grad = [torch.randn(s, generator=g).to(getattr(torch, x_type if i in (0, 5) else other)) for i, s in enumerate(shapes)]
    return tensors, grad


def attention_inputs(dtype: str, lengths: list[int], heads: int, width: int) -> tuple[Tensor, Tensor]:
    """qkv and the gradient of the result."""
    g = generator().manual_seed(sum(lengths) * width)
    return tuple(torch.randn(sum(lengths), columns, generator=g).to(getattr(torch, dtype)) for columns in (3 * width, width))


def plain(op: str, tensors: list[Tensor], grad: Tensor, *settings) -> list[Tensor]:
    """The result and its gradients, from the formula in the dtypes and on the device of the tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    seed = torch.tensor([SEED], device=grad.device)
    if op == "relu":
        out = relu_dropout_torch(*leaves, *settings, seed, STREAM)
    elif op == "norm":
        out = dropout_norm_torch(*leaves, *settings, EPS, seed, STREAM)
    else:
        lengths, heads, p = settings
        out = dialogue_attention_seeded(*leaves, lengths, heads, p, seed, STREAM)
    out = out.to(grad.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exact(op: str, tensors: list[Tensor], grad: Tensor, *settings) -> list[Tensor]:
    return plain(op, [t.double() for t in tensors], grad.double(), *settings)


NAMES = {"relu": ("out", "grad x", "grad bias"), "attention": ("out", "grad qkv"),
         "norm": ("out", "grad x", "grad bias", "grad residual", "grad weight", "grad norm_bias")}
