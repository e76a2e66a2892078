"""Triton's interpreter: whether it works here, and in a half to a fourth of its time."""

from __future__ import annotations

from dataclasses import replace

import numpy
import triton
from triton.runtime import interpreter


def why_not() -> str | None:
    if triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        return "the interpreter of Triton 3.6 needs NumPy below 2.4"
    return None


def hurry(overflow: bool) -> None:
    """overflow: whether it still checks sums and products of integers of up to 32 bits for it, a third of what it does.

    Functions that kernels call no longer make it patch triton.language each time, another third. A launch patches what its kernel's module
    sees, and restores it; what is left, triton's own library sees, and nobody restores it.
    """
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=overflow)
    patched = set()

    def call(self, *args, **kwargs):
        module = self.fn.__globals__["__name__"]
        if module not in patched:
            patched.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
