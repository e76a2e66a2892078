"""Ahead-of-time compilation, launches and host behaviour of the Triton kernels; no GPU, no interpreter."""

from __future__ import annotations

import re
from collections import Counter

import pytest

pytest.importorskip("triton")
pytest.importorskip("ada2i_fast.kernels")

import resources
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from ada2i_fast.kernels import common, dialogue_attention, tensor_ring

# What runs for one AFW layer with its loss when all modalities have one width.
FORWARD = Counter(project=1, contract=1, map_forward=1)
BACKWARD = Counter(map_backward=1, backward_rows=1, backward_weights=1, reduce_splits=2)

# The same with dense products through the library, three modalities, the rows in one chunk. "ieee": see `forward_through_library`.
LIBRARY_FORWARD = Counter(project=1, average_cores=1, contract_cores=1, pack_map=1, outer_rows=1, gate_rows=1)
LIBRARY_FORWARD_IEEE = LIBRARY_FORWARD + Counter(sum_cores=1) - Counter(project=1)
LIBRARY_BACKWARD = Counter(contract_cores=1, pack_map=1, gate_gradients=1, outer_rows=1, unpack_map=1, sum_cores=1, average_cores=1,
                           core_gradients=1, reduce_splits=1)
# Of these, what each further width and each further chunk takes.
WIDTH_FORWARD, WIDTH_BACKWARD = Counter(pack_map=1), Counter(pack_map=1, unpack_map=1)
CHUNK_FORWARD, CHUNK_BACKWARD = Counter(outer_rows=1, gate_rows=1), Counter(gate_gradients=1, outer_rows=1)
OF_LOSS = ("distance", "map_in_parts", "expand_signs", "split_rows")

# Attention, dropout + residual + LayerNorm and bias + ReLU + dropout of an encoder layer, each once.
ENCODER_FORWARD = Counter(attend=1, norm_rows=1, relu_rows=1)
ENCODER_BACKWARD = Counter(attend_gradients=1, norm_gradients=1, relu_gradients=1, reduce_splits=2)


def names(launches) -> Counter:
    return Counter(kernel.__name__ for kernel, *_ in launches)


def of_ring(launches) -> Counter:
    """Without those of attention_mapping through the library."""
    return Counter({name: count for name, count in names(launches).items() if name not in OF_LOSS})


def compilations(launches) -> set[tuple]:
    """What Triton would compile for these launches, each once."""
    return {resources.compilation(kernel, args, kwargs) for kernel, _, args, kwargs in launches}


class Watch(TorchDispatchMode):
    """The operators that are called inside: `seen`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("widths", [[300], [300] * 2, [300] * 3, [300] * 5])
def test_launches_do_not_grow_with_modalities(widths):
    forward, backward = resources.layer(torch.float32, 500, 10, widths, 11, gated=True)
    assert names(forward) == FORWARD and names(backward) == BACKWARD


def test_launches_per_distinct_width():
    forward, backward = resources.layer(torch.float32, 500, 10, [300, 200, 300], 11, gated=True)
    assert names(forward) == FORWARD + FORWARD and names(backward) == BACKWARD + BACKWARD


def test_launches_through_the_library():
    with resources.library(True):
        forward, backward = resources.layer(torch.bfloat16, 500, 10, [300] * 3, 11, gated=True)
        assert of_ring(forward) == LIBRARY_FORWARD and of_ring(backward) == LIBRARY_BACKWARD
        forward, backward = resources.layer(torch.float32, 500, 10, [30, 20, 30], 5, gated=True)
        assert of_ring(forward) == LIBRARY_FORWARD_IEEE + WIDTH_FORWARD + CHUNK_FORWARD
        assert of_ring(backward) == LIBRARY_BACKWARD + WIDTH_BACKWARD + CHUNK_BACKWARD
        assert resources.layer(torch.float32, 0, 10, [300] * 3, 11, gated=True) == ([], [])


def test_launches_through_the_library_in_chunks(monkeypatch):
    monkeypatch.setattr(common, "SCRATCH", 1)
    with resources.library(True):
        forward, backward = resources.layer(torch.bfloat16, 130, 10, [30] * 3, 5, gated=True)
    assert of_ring(forward) == LIBRARY_FORWARD + CHUNK_FORWARD + CHUNK_FORWARD
    assert of_ring(backward) == LIBRARY_BACKWARD + CHUNK_BACKWARD + CHUNK_BACKWARD


@pytest.mark.parametrize("kind,ieee,widths,count", [
    (torch.float32, True, [30] * 3, (4, 8)), (torch.float32, False, [30] * 3, (1, 8)), (torch.bfloat16, False, [30] * 3, (1, 8)),
    (torch.bfloat16, False, [30, 20, 30], (2, 10))])
def test_products_of_the_library(kind, ieee, widths, count, monkeypatch):
    """Of tensor_ring forward one per width, and with "ieee" one per modality; backward two per width and two per modality. Beside
    products and kernels nothing but allocations and views, for float32 parameters of 16-bit x too."""
    monkeypatch.setattr(common, "precision", lambda _: "ieee" if ieee else "tf32")
    made = []
    for name in ("product", "add_product"):
        monkeypatch.setattr(common, name, lambda *_: made.append(None))
    monkeypatch.setattr(torch, "addmm", lambda *_, out: made.append(None))
    m, rank = len(widths), 5
    x = [torch.empty(500, d, dtype=kind) for d in widths]
    weights = [[torch.empty(shape(d)) for d in widths]
               for shape in (lambda d: (4 * rank, d), lambda d: (4 * rank,), lambda d: (d, rank * rank), lambda d: (d,))]
    settings = [(j + i) % m for j in range(m) for i in range(1, m)], 1.0, 0.1, 0.0, None, True
    offsets = torch.tensor([0, 500])
    with resources.library(True), resources.recorded(), Watch() as ring:
        results = tensor_ring.forward(x, offsets, *weights, *settings, True)
        forward = len(made)
        tensor_ring.backward(x, x, x, offsets, *weights, results[2 * m:], *settings, x)
    assert (forward, len(made) - forward) == count
    assert ring.seen <= {"empty_like", "new_empty", "select", "slice", "view", "t", "transpose", "unbind"}, ring.seen


def test_many_rows_go_through_the_library():
    few = common.LIBRARY_ROWS["ieee"] - 1
    assert "outer_rows" not in names(resources.layer(torch.float32, few, 90, [8], 2, gated=True)[0])
    assert "outer_rows" in names(resources.layer(torch.float32, few + 1, 90, [8], 2, gated=True)[0])


def test_chunks_of_rows(monkeypatch):
    assert common.chunks(100_000, 4 * 304) == [(0, 100_000)]
    assert common.chunks(150_000, 4 * 304) == [(0, 75_008), (75_008, 150_000)]
    assert common.chunks(1, 4) == [(0, 1)]
    monkeypatch.setattr(common, "SCRATCH", 1)
    assert common.chunks(130, 4) == [(0, 64), (64, 128), (128, 130)]


@pytest.mark.parametrize("rows,dialogues,width,heads", [(500, 10, 1024, 8), (10_000, 1, 57, 1), (3, 3, 6144, 1)])
def test_launches_of_an_encoder(rows, dialogues, width, heads):
    forward, backward = resources.encoder(torch.float32, rows, dialogues, width, heads, 2048)
    assert names(forward) == ENCODER_FORWARD and names(backward) == ENCODER_BACKWARD


def test_no_launch_for_an_empty_batch():
    forward, backward = resources.layer(torch.float32, 0, 10, [300] * 3, 11, gated=True)
    assert not forward and not backward
    forward, backward = resources.encoder(torch.float32, 0, 10, 300, 5, 2048)
    assert not forward and not backward


def test_grids_stay_in_bounds():
    for rows, dialogues in ((100_000, 1), (100_000, 100_000), (7, 7)):
        with resources.library(False):
            layer = resources.layer(torch.bfloat16, rows, dialogues, [500] * 3, 32, gated=False)
        with resources.library(rows > 7):
            narrow = resources.layer(torch.bfloat16, rows, dialogues, [16] * 3, 32, gated=False)
        for launches in (*layer, *narrow,
                         *resources.encoder(torch.float32, rows, dialogues, 6144, 1, 6144)):
            for _, grid, *_ in launches:
                assert all(n >= 1 for n in grid) and all(n <= 65535 for n in grid[1:]), grid


def test_batches_do_not_recompile():
    """Numbers of rows and dialogues are neither compile-time constants nor specialised on."""
    seen = set()
    for rows, dialogues in ((480, 16), (481, 10), (1_000, 1), (33, 1)):
        for launches in resources.layer(torch.float32, rows, dialogues, [300] * 3, 11, gated=True):
            seen |= compilations(launches)
    assert len(seen) == 8       # seven kernels, reduce_splits for two ops
    seen = set()
    for rows, dialogues in ((480, 16), (481, 10), (1_000, 1), (33, 1)):
        with resources.library(True):
            for launches in resources.layer(torch.float32, rows, dialogues, [300] * 3, 11, gated=True):
                seen |= compilations(launches)
    assert len(seen) == 17      # thirteen kernels, three of them in both directions, split_rows of x and of weights
    seen = set()
    for rows, dialogues in ((480, 16), (481, 10), (1_000, 1), (33, 1)):
        for launches in resources.encoder(torch.float32, rows, dialogues, 300, 5, 2048):
            seen |= compilations(launches)
    assert len(seen) == 8       # seven kernels, reduce_splits for two ops


def test_no_synchronisation_and_no_copies():
    """The launchers allocate, view and launch: nothing that would read a value back or break a CUDA graph."""
    dialogue_attention.dialogue_offsets([50] * 10, torch.device("cpu"))         # the batch before, of the same lengths
    with Watch() as encoder:
        resources.encoder(torch.float32, 500, 10, 300, 5, 2048)
    with Watch() as layer:
        resources.layer(torch.float32, 500, 10, [300] * 3, 11, gated=True)
    assert encoder.seen <= {"empty", "empty_like", "new_empty", "select"}, encoder.seen
    assert layer.seen <= {"empty", "empty_like", "new_empty", "slice", "select", "sum"}, layer.seen
    with resources.library(True), Watch() as layer:
        resources.layer(torch.bfloat16, 500, 10, [300] * 3, 11, gated=True)
    # On a GPU a product is mm or addmm alone; here operands are widened first.
    assert layer.seen <= {"empty", "empty_like", "new_empty", "new_zeros", "slice", "sum", "select", "unbind", "t", "transpose", "view", "mul",
                          "_to_copy", "mm", "addmm", "bmm", "add", "copy_", "expand", "_unsafe_view"}, layer.seen


# ---- cosine_fusion


@pytest.mark.parametrize("modalities", [1, 3, 5])
@pytest.mark.parametrize("released", [True, False])
def test_fusion_launches(modalities, released):
    """Two each way, whatever the modalities; without labels one forward; none for an empty batch."""
    forward, backward = resources.fusion(torch.float32, 500, 300, 6, modalities, released)
    assert names(forward) == Counter(fuse_forward=1, sum_scores=1) and names(backward) == Counter(fuse_backward=1, project_weight=1)
    assert names(resources.fusion(torch.float32, 500, 300, 6, modalities, released, labels=False)[0]) == Counter(fuse_forward=1)
    assert resources.fusion(torch.float32, 0, 300, 6, modalities, released) == ([], [])


def test_fusion_does_not_recompile():
    seen = set()
    for rows in (480, 481, 1_000, 33, 1):
        for launches in resources.fusion(torch.float32, rows, 300, 6):
            seen |= compilations(launches)
            for _, grid, *_ in launches:
                assert all(n >= 1 for n in grid) and all(n <= 65535 for n in grid[1:]), grid
    assert len(seen) == 4
    for launches in resources.fusion(torch.float32, 5_000, 300, 6):
        seen |= compilations(launches)
    assert len(seen) == 5       # fuse_forward has blocks of two sizes


def test_fusion_fills_a_gpu():
    (_, grid, *_), _ = resources.fusion(torch.float32, 500, 300, 6)[0]
    assert grid == (125,)


def test_fusion_does_not_synchronise():
    with Watch() as fusion:
        resources.fusion(torch.float32, 500, 300, 6, released=True)
    assert fusion.seen <= {"empty", "empty_like", "new_empty"}, fusion.seen


# ---- head_losses


@pytest.mark.parametrize("rows", [1, 500, 2048, 2049, 100_000])
def test_head_launches(rows):
    """One forward, a second one beyond eight blocks of rows; two backward, one without a head; the same kernels whatever the rows."""
    second = Counter(sum_losses=1) if rows > 2048 else Counter()
    forward, backward = resources.head(torch.float32, rows, 6, 24)
    assert names(forward) == Counter(losses_forward=1) + second and names(backward) == Counter(losses_backward=1, reduce_splits=1)
    programs, = forward[0][1]
    assert programs == (1 if rows <= 2048 else -(-rows // 256))
    forward, backward = resources.head(torch.bfloat16, rows, 7, 0)
    assert names(forward) == Counter(losses_forward=1) + second and names(backward) == Counter(losses_backward=1)
    assert names(resources.head(torch.float32, rows, 6, 24, labels=False)[0]) == Counter(losses_forward=1)


def test_no_head_launch_for_an_empty_batch():
    assert resources.head(torch.float32, 0, 6, 24) == resources.head(torch.float32, 0, 6, 0, labels=False) == ([], [])


def test_head_does_not_recompile():
    seen = set()
    for rows in (480, 481, 33, 1, 5_000, 100_000):
        for launches in resources.head(torch.float32, rows, 6, 24):
            seen |= compilations(launches)
            for _, grid, *_ in launches:
                assert all(n >= 1 for n in grid) and all(n <= 65535 for n in grid[1:]), grid
    assert len(seen) == 4


def test_head_does_not_synchronise():
    with Watch() as head:
        resources.head(torch.bfloat16, 5_000, 6, 24, parameters=torch.float32, of_log_prob=True)
    assert head.seen <= {"empty", "empty_like", "new_empty"}, head.seen


def test_resources():
    """Every kernel at IEMOCAP sizes on sm_90 with products in TF32, whatever the table says: that it is of what there is."""
    compare(resources.table(["iemocap"], ["tf32"], [90]))


def test_factors_of_tf32_products_are_rounded():
    """Tensor cores would cut them off, which no interpreter shows."""
    with resources.precision("tf32"):
        launches = resources.launches_of("iemocap", torch.float32)
    multiplying = set()
    for kernel, args, kwargs in resources.distinct(launches):
        what, options = resources.source(kernel, args, kwargs)
        ptx = triton.compile(what, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        if re.search(r"mma\S*\.tf32", ptx):
            multiplying.add(kernel.__name__)
            assert "cvt.rna.tf32" in ptx, kernel.__name__
    assert multiplying >= {"project", "contract", "backward_rows", "backward_weights", "map_forward", "map_backward", "attend", "attend_gradients"}


@pytest.mark.slow
def test_all_resources():
    """Every kernel, dtype, dataset and architecture; compiled where the table is not of what there is now."""
    compare(resources.table(recorded_rows=resources.load()))


def compare(rows):
    recorded = resources.load()
    found = resources.complaints(rows, recorded if recorded is not None else rows)
    assert not found, "\n".join(found)


def test_complaints_are_raised():
    good = {"registers": 100, "stack": 0, "local": 0, "shared": 1000}
    key = "project/iemocap/float32/sm_90"
    assert not resources.complaints({key: good}, {key: good})
    for bad, word in ((dict(good, stack=8), "spills"), (dict(good, local=8), "spills"), (dict(good, registers=109), "registers"),
                      (dict(good, shared=1001), "recorded 1000"), (dict(good, shared=300_000), "the architecture")):
        assert word in "\n".join(resources.complaints({key: bad}, {key: good}))
    assert "not in" in resources.complaints({key: good}, {})[0]


def test_what_changed_is_compiled(monkeypatch):
    recorded, key, compiled = resources.load() or {}, "project/iemocap/float32/sm_90", []
    if "digest" not in recorded.get(key, {}):
        pytest.skip(f"no digests for Triton {resources.VERSION}")
    monkeypatch.setattr(resources, "in_processes", lambda tasks: compiled.extend(tasks) or [{}] * len(tasks))
    some = ["iemocap"], ["float32"], [90]
    assert resources.table(*some, recorded)[key] == recorded[key] and not compiled
    recorded[key]["digest"] = "another"
    resources.table(*some, recorded)
    assert [task[0].__name__ for task in compiled] == ["project"]
