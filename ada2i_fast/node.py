"""A layer of AFW, the layers of an encoder, or what BalancedAdam does with its tensors in one call: `lib/libada2i_torch.so` (csrc/torch)
checks, brings memory, calls the CPU's library, for a layer of AFW the CUDA one too, and makes the nodes of autograd's graph.

In Python, which `ops` is, that takes as long as ten short dialogues' arithmetic on a CPU, and longer where arithmetic has emptied the caches;
on a GPU it takes several times as long as the kernels.
The library is built for one version of torch and of Python; where others run, or what it is given is not plain, Python does the same.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

import torch

from . import backends, cpu, cuda

__all__ = ["afw_layer", "balanced_adam", "cuda_afw_layer", "encoder_layers", "why_not"]

PATH = cpu.PATH.with_name("libada2i_torch.so")
ABI_VERSION = 4


@functools.cache
def _load() -> ModuleType | str:
    """The module, or why there is none."""
    if reason := cpu.why_not():
        return reason
    if not PATH.exists():
        return backends.build_reason("torch")
    built, here = backends.build_facts("torch"), {"torch": torch.__version__, "python": "%d.%d" % sys.version_info[:2]}
    if others := [f"{name} {built.get(name)}, not {version}" for name, version in here.items() if built.get(name) != version]:
        return f"built for {' and '.join(others)}: install the package again (pip install -e .)"
    try:
        loader = importlib.machinery.ExtensionFileLoader("ada2i_torch", str(PATH))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader("ada2i_torch", loader))
        loader.exec_module(module)
        backends.check_version(module.ABI_VERSION, ABI_VERSION)
    except (ImportError, RuntimeError) as error:
        return f"{PATH.name} does not load: {error}"
    from .ops.afw_layer import differentiable       # files that import this one
    from .ops.encoder_layer import differentiable_attention, differentiable_inner, plan

    module.use(cpu.address, torch.nn.Parameter, plan=plan, afw_layer=differentiable, encoder_attention=differentiable_attention,
               encoder_inner=differentiable_inner)
    return module


def why_not() -> str | None:
    found = _load()
    return found if isinstance(found, str) else None


def afw_layer(*arguments: object) -> tuple[list[torch.Tensor], torch.Tensor | None] | None:
    """x, offsets, the six kinds of parameters, ring, scale, beta, dropout, seed, gated_target, reduction and with_loss, as `ops.afw_layer`
    takes them; its result, or None where these are for Python."""
    return _called("afw_layer", (*arguments, -1))


def cuda_afw_layer(*arguments: object) -> tuple[list[torch.Tensor], torch.Tensor | None] | None:
    """As `afw_layer`, by the kernels of the CUDA backend; the last argument is x's `cuda.dtype_code`. Not looked at: what offsets hold."""
    module = _load()
    if isinstance(module, str):
        return None
    _use_cuda(module, cuda.library())
    return module.afw_layer(*arguments)


@functools.lru_cache(maxsize=1)
def _use_cuda(module: ModuleType, handle: ctypes.CDLL) -> None:
    module.use_cuda(lambda name: ctypes.cast(getattr(handle, name), ctypes.c_void_p).value)


def encoder_layers(*arguments: object) -> torch.Tensor | None:
    """x, lengths, layers, heads, p, eps, seed, stream and out, as `ops.encoder_layers` takes them; its result, or None where these are for
    Python, which is also where products have still to be measured."""
    return _called("encoder_layers", arguments)


def balanced_adam(*arguments: object) -> object | None:
    """Lists of parameters, the optimiser's state, and the parameters and steps of a table of `optim`: if that fits them still, what makes the
    library's two passes over them and their gradients, `measure()` and `update(settings, numbers, seed, beta1, beta2, eps)`."""
    return _called("balanced_adam", arguments)


def _called(name: str, arguments: tuple) -> object:
    module = _load()
    if isinstance(module, str):
        return None
    cpu.flush()
    return getattr(module, name)(*arguments)
