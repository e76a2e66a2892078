"""Ahead-of-time resource table of the Triton kernels; needs no GPU.

    python -m tests.kernels.resources              compare with tests/data/triton_resources.json
    python -m tests.kernels.resources --update     write it (for the installed Triton)

What is compiled is what the launchers launch: they run with Triton's `run` replaced by a recorder, and each recorded launch
is compiled for every architecture. Registers, stack and local memory come from Triton's own cuobjdump, dynamic shared memory
from the compiler's metadata. One table per Triton version (major.minor).

A row has a digest, too, of all that Triton compiles it from: its own cache's key. Tests take a row whose digest is the recorded one as it
stands there, for it would be compiled to the same; so what changed is compiled, and not 1,900 kernels each time, a second each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TABLE = Path(__file__).resolve().parents[1] / "data" / "triton_resources.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
VERSION = ".".join(triton.__version__.split(".")[:2])

# name: rows, dialogues, width, rank, gated target (released) or attention (published)
DATASETS = {"iemocap": (500, 10, 300, 11, True), "meld": (96, 10, 200, 6, False), "mosei": (230, 32, 500, 10, True)}
# name: rows, dialogues, width and heads of one encoder, feed-forward width. Heads of 128, 57, 64; "wide": 288, in several blocks.
ENCODERS = {"iemocap": (500, 10, 1024, 8, 2048), "meld": (96, 10, 342, 6, 2048), "mosei": (230, 32, 512, 8, 2048),
            "wide": (500, 10, 1440, 5, 6144)}
# "tf32": float32 with products in TF32, for one architecture.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32}
# Shared memory that one block may use, bytes (CUDA C++ programming guide, technical specifications).
SHARED = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int8: "*i8"}
ALIGNED = [["tt.divisibility", 16]]


@contextmanager
def recorded() -> Iterator[list]:
    """Collects (kernel, grid, args, kwargs) of every launch, and launches nothing."""
    launches: list = []
    original = JITFunction.run

    def run(self, *args, grid, warmup=False, **kwargs):
        launches.append((self, grid, args, kwargs))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


@contextmanager
def library(used: bool) -> Iterator[None]:
    """Whether dense products go through the library inside, whatever the rows."""
    from ada2i_fast.kernels import common

    usual = common.LIBRARY_ROWS
    common.LIBRARY_ROWS = dict.fromkeys(usual, 1 if used else 2 ** 31)
    try:
        yield
    finally:
        common.LIBRARY_ROWS = usual


def layer(dtype: torch.dtype, rows: int, dialogues: int, widths: list[int], rank: int, gated: bool, dropout: float = 0.5,
          beside: bool = False, ops: bool = False) -> tuple[list, list]:
    """Launches of one AFW layer with its loss and float32 parameters: (forward, backward). beside: gradients of parameters apart from the
    rest, as in a CUDA graph. ops: of the two ops, as in compiled code."""
    from ada2i_fast.kernels import attention_mapping, tensor_ring
    from ada2i_fast.ops.linear import here

    m = len(widths)
    x = [torch.empty(rows, d, dtype=dtype) for d in widths]
    weights = [[torch.empty(shape(d)) for d in widths]
               for shape in (lambda d: (4 * rank, d), lambda d: (4 * rank,), lambda d: (d, rank * rank), lambda d: (d,))]
    phi = [torch.empty(d, d) for d in widths], [torch.empty(d) for d in widths]
    offsets = torch.empty(dialogues + 1, dtype=torch.int64)
    ring = [(j + i) % m for j in range(m) for i in range(1, m)]
    seed = torch.empty(1, dtype=torch.int64)
    coefficient = [0.5] * m
    with recorded() as forward:
        results = tensor_ring.forward(x, offsets, *weights, ring, 1.0, 0.1, dropout, seed, gated, True)
        _, *sign = attention_mapping.forward(x, results[m:2 * m], *phi, coefficient)
    with recorded() as backward:
        branch = (lambda call, *tensors: call(*tensors)) if beside else here
        given, factors = torch.empty(()), None
        if ops:
            of_loss = attention_mapping.backward(given, x, sign, phi[0], coefficient, None, branch)
        else:
            of_loss, factors = attention_mapping.backward_for_gate(given, x, sign, phi[0], coefficient, None, branch)
        tensor_ring.backward(x, of_loss[m:2 * m], x, offsets, *weights, results[2 * m:], ring, 1.0, 0.1, dropout, seed, gated,
                             None if ops else of_loss[:m], branch, factors)
    return forward, backward


# ---- cosine_fusion
CLASSES = {"iemocap": 6, "meld": 7, "mosei": 7}


def fusion(dtype: torch.dtype, rows: int, width: int, classes: int, modalities: int = 3, released: bool = False,
           labels: bool = True) -> tuple[list, list]:
    """Launches of AMW with its scores and ratio: (forward, backward)."""
    from ada2i_fast.kernels import cosine_fusion

    hidden = [torch.empty(rows, width, dtype=dtype) for _ in range(modalities)]
    weight = torch.empty(classes, modalities * width, dtype=dtype)
    bias = torch.empty(classes, dtype=dtype) if released else None
    norm, score_from = ("classes", "linear") if released else ("features", "cosine")
    with recorded() as forward:
        joint, _, norms, *_ = cosine_fusion.forward(hidden, weight, bias, torch.empty(rows, dtype=torch.int64) if labels else None, True,
                                                    norm, 10.0, score_from)
    with recorded() as backward:
        cosine_fusion.backward(joint, hidden, weight, norms, released, True, norm, 10.0)
    return forward, backward


# ---- head_losses
def head(dtype: torch.dtype, rows: int, classes: int, inner: int, labels: bool = True, parameters: torch.dtype | None = None,
         of_log_prob: bool = False) -> tuple[list, list]:
    """Launches of the head, of no inner units without one, and the losses: (forward, backward)."""
    from ada2i_fast.kernels import head_losses

    joint, extra = torch.empty(rows, classes, dtype=dtype), torch.empty(())
    given = [torch.empty(shape, dtype=parameters or dtype) for shape in ((inner, classes), (inner,), (classes, inner), (classes,))]
    given = given if inner else []
    y = torch.empty(rows, dtype=torch.int64) if labels else None
    with recorded() as forward:
        log_prob, loss, count = (*head_losses.forward(joint, given, y, extra, torch.float32), None, None)[:3]
    with recorded() as backward:
        head_losses.backward(log_prob if of_log_prob or not labels else None, loss, joint, given, y, log_prob, count)
    return forward, backward


# ---- the encoders
def encoder(dtype: torch.dtype, rows: int, dialogues: int, width: int, heads: int, feedforward: int,
            dropout: float = 0.5) -> tuple[list, list]:
    """Launches of attention, of one dropout + residual + LayerNorm and of bias + ReLU + dropout: (forward, backward)."""
    from ada2i_fast.kernels import dialogue_attention, dropout as fused

    lengths = [rows // dialogues] * (dialogues - 1)
    lengths.append(rows - sum(lengths))
    seed = torch.empty(1, dtype=torch.int64) if dropout else None
    x, qkv, inner = (torch.empty(rows, d, dtype=dtype) for d in (width, 3 * width, feedforward))
    bias, inner_bias = (torch.empty(d, dtype=dtype) for d in (width, feedforward))
    with recorded() as forward:
        out, logsum = dialogue_attention.forward(qkv, lengths, heads, dropout, seed, 0)
        _, mean, rstd = fused.norm_forward(x, bias, x, bias, bias, dropout, 1e-5, seed, 1)
        fused.relu_forward(inner, inner_bias, dropout, seed, 2)
    with recorded() as backward:
        fused.relu_backward(inner, inner, dropout)
        fused.norm_backward(x, x, bias, x, bias, mean, rstd, dropout, seed, 1)
        dialogue_attention.backward(x, qkv, out, logsum, lengths, heads, dropout, seed, 0)
    return forward, backward


def source(kernel: JITFunction, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """What Triton would compile for a launch, and the compiler's options in it."""
    signature, constants, attributes = {}, {}, {}
    kwargs = dict(kwargs)
    named = dict(zip(kernel.arg_names, args))

    def describe(value, path: tuple[int, ...], specialise: bool):
        if isinstance(value, tuple):
            return tuple(describe(item, (*path, i), specialise) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            # The caching allocator aligns to 512 bytes; a tensor that starts elsewhere makes no promise.
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[path] = ALIGNED
            return POINTER[value.dtype]
        if value is None:
            constants[path] = None
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if specialise and value == 1:
            constants[path] = 1
            return "constexpr"
        if specialise and value % 16 == 0:
            attributes[path] = ALIGNED
        return "i32"

    for index, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            constants[(index,)] = kwargs.pop(parameter.name)
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = describe(named[parameter.name], (index,), not parameter.do_not_specialize)
    return ASTSource(kernel, signature, constants, attributes), kwargs


def compilation(kernel: JITFunction, args: tuple, kwargs: dict) -> tuple[str, ...]:
    """What makes two launches share one compiled kernel."""
    what, options = source(kernel, args, kwargs)
    return kernel.__name__, str(what.signature), str(what.constants), str(what.attrs), str(options)


def digest(kernel: JITFunction, args: tuple, kwargs: dict) -> str:
    """Of the sources, their constants, the options and the compiler."""
    what, options = source(kernel, args, kwargs)
    return hashlib.sha256(f"{triton.__version__} {what.hash()} {sorted(options.items())}".encode()).hexdigest()[:12]


def distinct(launches: list) -> Iterator[tuple[JITFunction, tuple, dict]]:
    """One launch of each that would be compiled."""
    known = set()
    for kernel, _, args, kwargs in launches:
        if (facts := compilation(kernel, args, kwargs)) not in known:
            known.add(facts)
            yield kernel, args, kwargs


def usage(kernel: JITFunction, args: tuple, kwargs: dict, capability: int) -> dict[str, int]:
    """Compile one launch: registers, stack and local bytes per thread, shared bytes per block."""
    what, options = source(kernel, args, kwargs)
    compiled = triton.compile(what, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "local": int(found["LOCAL"]),
            "shared": compiled.metadata.shared}


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Float32 products inside as this one of `DTYPES` has them."""
    usual = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = usual


def launches_of(dataset: str, dtype: torch.dtype) -> list:
    """Every kernel's, at the sizes of a data set."""
    launches = sum(encoder(dtype, *ENCODERS[dataset]), [])
    if dataset not in DATASETS:
        return launches
    # The encoders' are last: after attention_mapping reduce tensor_ring, bias + ReLU + dropout, and dropout + residual + LayerNorm.
    count, dialogues, width, rank, gated = DATASETS[dataset]
    layers = []
    for used, beside, ops in ((False, False, False), (False, True, False), (True, False, False), (False, False, True), (True, False, True)):
        with library(used):
            layers += sum(layer(dtype, count, dialogues, [width] * 3, rank, gated, beside=beside, ops=ops), [])
    launches = layers + launches + sum(fusion(dtype, count, width, CLASSES[dataset], released=gated), [])
    # float32 parameters as under autocast; first more rows, so that sum_losses is among them.
    for n, inner in ((5000, 4 * CLASSES[dataset]), (count, 0)):
        launches += sum(head(dtype, n, CLASSES[dataset], inner, parameters=torch.float32), [])
    return launches


def table(datasets=ENCODERS, dtypes=DTYPES, capabilities=SHARED, recorded_rows: dict | None = None) -> dict[str, dict]:
    """recorded_rows: from `load`, for what is not compiled again."""
    rows, tasks = {}, {}
    for dataset in datasets:
        for dtype in dtypes:
            with precision(dtype):
                launches = launches_of(dataset, DTYPES[dtype])
            seen: dict[str, int] = {}
            for kernel, args, kwargs in distinct(launches):
                name = kernel.__name__
                seen[name] = seen.get(name, 0) + 1
                name += f"_{seen[name]}" if seen[name] > 1 else ""
                same = digest(kernel, args, kwargs)
                for capability in capabilities if dtype != "tf32" else [90]:
                    key = f"{name}/{dataset}/{dtype}/sm_{capability}"
                    rows[key] = (recorded_rows or {}).get(key, {})
                    if rows[key].get("digest") != same:
                        rows[key] = {"digest": same}
                        tasks[key] = kernel, args, kwargs, capability
    for key, found in zip(tasks, in_processes(list(tasks.values()))):
        rows[key] |= found
    return rows


_tasks: list[tuple] = []                # of the processes that are forked, since kernels cannot be sent


def in_processes(tasks: list[tuple]) -> list[dict[str, int]]:
    """`usage` of each, in as many processes as there are cores: compilers take a second for each."""
    _tasks[:] = tasks
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return pool.map(_usage_of, range(len(tasks)), chunksize=4)


def _usage_of(task: int) -> dict[str, int]:
    return usage(*_tasks[task])


def complaints(rows: dict[str, dict[str, int]], recorded_rows: dict[str, dict[str, int]], slack: int = 8) -> list[str]:
    """What is wrong with `rows`: spills, too much shared memory, more registers or shared memory than recorded."""
    found = []
    for key, row in rows.items():
        # An older Triton may spill a few bytes where the newest does not: those are recorded, and may not become more.
        if row["local"] or row["stack"] > recorded_rows.get(key, {}).get("stack", 0):
            found.append(f"{key}: spills, stack {row['stack']} and local {row['local']} bytes per thread")
        limit = SHARED[int(key.rsplit("_", 1)[1])]
        if row["shared"] > limit:
            found.append(f"{key}: {row['shared']} bytes of shared memory, the architecture has {limit}")
        old = recorded_rows.get(key)
        if old is None:
            found.append(f"{key}: not in {TABLE.name}; run python -m tests.kernels.resources --update")
        elif row["registers"] > old["registers"] + slack:
            found.append(f"{key}: {row['registers']} registers, recorded {old['registers']}")
        elif row["shared"] > old["shared"]:
            found.append(f"{key}: {row['shared']} bytes of shared memory, recorded {old['shared']}")
    return found


def load(version: str = VERSION) -> dict[str, dict[str, int]] | None:
    """The recorded table for a Triton version, or None."""
    columns, *rows = json.loads(TABLE.read_text()).get(version, [None])
    return {key: dict(zip(columns, values)) for key, *values in rows} if columns else None


def save(rows: dict[str, dict[str, int]]) -> None:
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    columns = ["registers", "stack", "local", "shared", "digest"]
    tables[VERSION] = [columns, *([key, *(row[c] for c in columns)] for key, row in sorted(rows.items()))]
    body = ",\n".join(f' {json.dumps(version)}: [\n  ' + ",\n  ".join(json.dumps(row) for row in tables[version]) + "\n ]"
                      for version in sorted(tables))
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("{\n" + body + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    arguments = parser.parse_args()
    rows = table()
    if arguments.update:
        save(rows)
    recorded_rows = load() or {}
    if arguments.update:                                        # what was just written excuses no spill
        recorded_rows = {key: {**row, "stack": 0} for key, row in recorded_rows.items()}
    found = complaints(rows, recorded_rows)
    print("\n".join(found) or f"{len(rows)} compilations: no spills, within shared memory, as recorded for {VERSION}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
