"""Where the time of a training step goes: `python -m benchmarks.profile` writes results/<device name>/profile.json and renders the pages.

The whole model on a CPU, at IEMOCAP and MELD sizes, in float32 and under bf16 autocast, this package beside the textbook. Steps with and
without torch.profiler alternate. Every event's own time (without its children) goes to one part:

    in the package      the part of the registered op or the function of the CPU's library that it belongs to, if any
    a matrix product    by its shape: rows times an encoder's weight is forward or input gradient, a sum over rows a weight gradient
    anything else       the part of the model that is running; in backward that of the forward call with the same sequence number
    what is left        "everything else": Python, dispatch, autograd, and what the profiler itself takes

Times are medians over rounds. A part's floor counts as `cases.parts` and is turned into seconds by the rates of `machine`.
Data preparation is measured as it happens: a training pass over a corpus of the data set's size through `training.batches`.

With --device cuda: a training step as a CUDA graph, its kernels by their names; float32 with TF32 products. Branches of the graph run side by
side, so the kernels' times add up to more than the step takes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import random
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from . import cases, implementations, machine, report
from .cases import IEMOCAP, MELD, Case

CASES = [Case("model", shape, "training", dtype) for shape in (IEMOCAP, MELD) for dtype in ("float32", "bfloat16")]
NAMES = ("cpu", "textbook")
SPAN = "part: "

FORWARD, INPUT, WEIGHT = (f"encoder products, {kind}" for kind in ("forward", "input gradients", "weight gradients"))
ATTENTION, RELU, NORM, ENCODER = "dialogue attention", "bias, ReLU, dropout", "dropout, residual, LayerNorm", "encoders, the rest"
AFW, FUSION = "feature weighting", "cosine fusion, head, losses, ratio"
MEASURE, UPDATE, CASTS, REST = "optimiser: norm and spread", "optimiser: update", "casts of autocast", "everything else"
PARTS = (FORWARD, INPUT, WEIGHT, ATTENTION, RELU, NORM, ENCODER, AFW, FUSION, MEASURE, UPDATE, CASTS, REST)

# By the beginning of the name of a registered op or, where a node calls the CPU's library itself, of its function; one that is not here
# is a part of its own.
OPS = {"linear_forward": FORWARD, "linear_input": INPUT, "linear_backward": WEIGHT, "tensor_ring": AFW, "attention_mapping": AFW,
       "cosine_fusion": FUSION, "head_losses": FUSION, "relu_dropout": RELU, "dropout_norm": NORM, "dialogue_attention": ATTENTION,
       "balanced_adam_measure": MEASURE, "balanced_adam_settings": MEASURE, "balanced_adam_update": UPDATE}
# Matrix products by name, with the place of the left operand among the inputs and whether the right one comes transposed.
PRODUCTS = {"aten::mm": (0, False), "aten::addmm": (1, False), "mkldnn::_linear_pointwise": (0, True)}
# On a GPU.
ALL_PRODUCTS, PARTIAL, COPIES = "encoder products", "sums of partial gradients", "everything else"
LIBRARY = re.compile("gemm|gemv|cutlass|nvjet|splitK")
CALLS = 10                      # of a step, one after the other, at whose end the host waits
NORMS = ("aten::_foreach_norm", "aten::linalg_vector_norm", "aten::std", "aten::mean")


@contextlib.contextmanager
def spans(competitor):
    """Marks the parts of a model's forward pass and the optimiser's step for the profiler."""
    undo = []

    def span(part):
        return record_function(SPAN + part)

    def watch(module, part):
        open_spans = []

        def enter(*_):
            open_spans.append(span(part))
            open_spans[-1].__enter__()

        def leave(*_):
            open_spans.pop().__exit__(None, None, None)

        undo.extend((module.register_forward_pre_hook(enter).remove, module.register_forward_hook(leave).remove))

    def wrap(holder, name, part):
        before = holder[name]

        def wrapped(*args, **kwargs):
            with span(part):
                return before(*args, **kwargs)

        holder[name] = wrapped
        undo.append(lambda: holder.__setitem__(name, before))

    net = competitor.model.net
    for encoder in net.encoder.values():
        watch(encoder, ENCODER)
        for layer in encoder.transformer_encoder.layers:    # modules that are called in the textbook alone
            for name, part in (("self_attn", ATTENTION), ("dropout", RELU), ("dropout1", NORM), ("norm1", NORM), ("dropout2", NORM),
                               ("norm2", NORM)):
                watch(getattr(layer, name), part)
    if competitor.padded:
        for name in ("tensor_ring", "attention_mapping"):
            wrap(type(competitor.model).forward.__globals__, name, AFW)
        wrap(vars(implementations.reference), "balanced_step", UPDATE)
    else:
        watch(net.mmt, AFW)
        step = competitor.optimizer.step

        def stepped(*args, **kwargs):
            with span(UPDATE):
                return step(*args, **kwargs)

        competitor.optimizer.step = stepped
        undo.append(lambda: setattr(competitor.optimizer, "step", step))
    try:
        yield
    finally:
        for each in reversed(undo):
            each()


def ancestors(event):
    """The event and all that it happened in, from the inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent


def product(event, case: Case) -> str | None:
    """Which of the encoders' matrix products this is, or None."""
    if event.name.startswith("ada2i_linear_"):
        return OPS[event.name.removeprefix("ada2i_")]
    if event.name not in PRODUCTS or not event.input_shapes:
        return None
    first, transposed = PRODUCTS[event.name]
    left, right = event.input_shapes[first:first + 2]
    if len(left) != 2 or len(right) != 2:
        return None
    rows, inner, columns = left[0], left[1], right[0 if transposed else 1]
    config, lengths = case.shape.config(case.preset), case.shape.lengths
    weights = {(a, b) for w in config.input_widths.values()
               for a, b in ((w, 3 * w), (w, w), (w, config.feedforward_dim), (config.feedforward_dim, w), (w, config.hidden_dim))}
    several = (sum(lengths), len(lengths) * max(lengths))
    if inner in several and ((rows, columns) in weights or (columns, rows) in weights):
        return WEIGHT
    if rows in several and ((inner, columns) in weights or (columns, inner) in weights):
        backward = any(e.name.startswith("autograd::engine") for e in ancestors(event))
        return INPUT if backward else FORWARD
    return None


def attribute(events, case: Case) -> dict[str, float]:
    """Seconds per part of one profiled step."""
    forward: dict[int, object] = {}         # sequence number -> the last forward event that has it: the one that made the node
    for event in sorted(events, key=lambda e: e.time_range.start):
        if event.sequence_nr >= 0 and not any(e.name.startswith("autograd::engine") for e in ancestors(event)):
            forward[event.sequence_nr] = event
    made_in: dict[int, str | None] = {}

    def span(event) -> str | None:
        """The part that runs: the innermost span around the event, or around the forward call that it is the gradient of."""
        for e in ancestors(event):
            if e.name.startswith(SPAN):
                return e.name.removeprefix(SPAN)
            if e.name.startswith("autograd::engine"):
                if ": Encoder" in e.name:       # nodes in C++ (csrc/torch), whose number no forward event has
                    return ENCODER
                number = e.sequence_nr
                if number not in made_in:
                    at = forward.get(number)
                    made_in[number] = None if at is None else place(at)
                return made_in[number]
        return None

    def place(event) -> str:
        names = [e.name for e in ancestors(event)]
        part = span(event)
        if part != UPDATE and case.dtype != "float32" and "aten::_to_copy" in names:
            return CASTS
        if part == UPDATE:
            return MEASURE if any(name in NORMS for name in names) else UPDATE
        if part == ENCODER:                 # plain functions: this package under autocast, and between the textbook's modules
            outermost = next((e for e in reversed([*ancestors(event)]) if e.name.startswith("aten::")), event)
            if outermost.name == "aten::scaled_dot_product_attention":
                return ATTENTION
            if outermost.name in ("aten::relu", "aten::relu_") or outermost.name == "aten::dropout" and \
                    outermost.input_shapes[0][-1:] == [case.shape.config().feedforward_dim]:
                return RELU
            if outermost.name in ("aten::dropout", "aten::layer_norm", "aten::add"):
                return NORM
        if part is None and "aten::dropout" in names:
            return AFW                      # of the gate
        return part or FUSION

    seconds: dict[str, float] = {}
    for event in events:
        own = next((e.name for e in ancestors(event) if e.name.startswith("ada2i_")), None)
        if own:                             # with all that it calls
            name = own.removeprefix("ada2i_").removeprefix("fast::")
            part = next((p for beginning, p in OPS.items() if name.startswith(beginning)), name.removesuffix("_forward").removesuffix("_backward"))
        elif not event.name.startswith(("aten::", "mkldnn::")):
            part = REST                     # spans, autograd's nodes, Python functions of autograd
        elif any(e.name == "torch::autograd::AccumulateGrad" for e in ancestors(event)):
            part = REST
        else:
            part = product(event, case) or place(event)
        seconds[part] = seconds.get(part, 0.0) + event.self_cpu_time_total * 1e-6
    return seconds


def profiled(competitor, case: Case) -> tuple[float, dict[str, float]]:
    """Seconds of a step under the profiler, and per part."""
    with spans(competitor), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        start = time.perf_counter()
        competitor.run()
        seconds = time.perf_counter() - start
    found = attribute(trace.events(), case)
    found[REST] = seconds - sum(s for part, s in found.items() if part != REST)
    return seconds, found


def measure_case(case: Case, rounds: int) -> list[dict]:
    """A row per implementation."""
    competitors = {name: implementations.build(case, name, "cpu") for name in NAMES}
    plain: dict[str, list[float]] = {name: [] for name in NAMES}
    under: dict[str, list[float]] = {name: [] for name in NAMES}
    split: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for turn in range(rounds + 2):          # two rounds warm up
        for name, competitor in competitors.items():
            start = time.perf_counter()
            competitor.run()
            seconds = time.perf_counter() - start
            watched, found = profiled(competitor, case)
            if turn >= 2:
                plain[name].append(seconds)
                under[name].append(watched)
                split[name].append(found)
    floors = {part: cases.floor_seconds(*work, machine.matrix_rate("cpu", case.dtype), machine.bandwidth("cpu"))
              for part, work in cases.parts(case).items()}
    rows = []
    for name in NAMES:
        names = dict.fromkeys([*PARTS[:-1], *(part for found in split[name] for part in found), REST])
        parts = {part: statistics.median(found.get(part, 0.0) for found in split[name]) for part in names}
        parts = {part: s for part, s in parts.items() if s >= 1e-6 or part in floors}
        rows.append(dict(case=case.group, shape=case.shape.name, dtype=case.dtype, implementation=name, rounds=rounds,
                         step_seconds=statistics.median(plain[name]),
                         watched_seconds=statistics.median(under[name]), parts=parts, floors=floors, matrix_rate=machine.matrix_rate("cpu", case.dtype),
                         bandwidth=machine.bandwidth("cpu")))
    return rows


def parts_of_kernels() -> dict[str, str]:
    """{name of a kernel of this package: part}."""
    from triton.runtime import JITFunction

    from ada2i_fast.kernels import attention_mapping, common, cosine_fusion, dialogue_attention, dropout, head_losses, tensor_ring

    found = {"measure_kernel": MEASURE, "measure_tensor_kernel": MEASURE, "settings_kernel": MEASURE, "update_kernel": UPDATE}
    for module, part in ((tensor_ring, AFW), (attention_mapping, AFW), (dialogue_attention, ATTENTION), (cosine_fusion, FUSION),
                         (head_losses, FUSION), (dropout, NORM), (common, PARTIAL)):
        found |= {name: RELU if name.startswith("relu") else part for name, f in vars(module).items()
                  if isinstance(f, JITFunction) and f.__module__ == module.__name__}
    return found


def measure_kernels(case: Case, rounds: int) -> dict:
    """A row for a step as a CUDA graph."""
    own, step = parts_of_kernels(), implementations.build(case, "graph", "cuda").run
    found, times = [], []
    for turn in range(rounds + 1):          # one round warms up
        machine.synchronize("cuda")
        start = time.perf_counter()
        for _ in range(CALLS):
            step()
        machine.synchronize("cuda")
        if turn:
            times.append((time.perf_counter() - start) / CALLS)
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            step()
            machine.synchronize("cuda")
        seconds: dict[str, float] = {}
        count = 0
        for event in trace.key_averages():
            if event.device_time_total:
                name = event.key.split("(")[0].split("::")[-1]
                part = own.get(name) or (ALL_PRODUCTS if LIBRARY.search(event.key) else COPIES)
                seconds[part] = seconds.get(part, 0.0) + event.device_time_total * 1e-6
                count += event.count
        found.append(seconds)
    parts = {part: statistics.median(s.get(part, 0.0) for s in found) for part in (ALL_PRODUCTS, *PARTS[3:11], PARTIAL, COPIES)
             if any(part in s for s in found)}
    rate, bandwidth = machine.matrix_rate("cuda", case.dtype), machine.bandwidth("cuda")
    floors: dict[str, float] = {}
    for part, work in cases.parts(case).items():
        name = ALL_PRODUCTS if part in (FORWARD, INPUT, WEIGHT) else part
        floors[name] = floors.get(name, 0.0) + cases.floor_seconds(*work, rate, bandwidth)
    return dict(case=case.group, shape=case.shape.name, dtype=case.dtype, implementation="graph", rounds=rounds, kernels=count,
                step_seconds=statistics.median(times), watched_seconds=sum(parts.values()), parts=parts, floors=floors, matrix_rate=rate,
                bandwidth=bandwidth)


def preparation(shape: cases.Shape, conversations: int, lengths: tuple[int, int]) -> dict:
    """A training pass over `conversations` drawn ones, batches made as training makes them: seconds inside steps and outside."""
    from ada2i_fast import Ada2I, BalancedAdam
    from ada2i_fast.data import synthetic_corpus
    from ada2i_fast.training import batches

    config = shape.config()
    corpus = synthetic_corpus(conversations=conversations, min_length=lengths[0], max_length=lengths[1], widths=dict(config.input_widths))
    order = list(range(conversations))
    random.Random(0).shuffle(order)
    model = Ada2I(config)
    optimizer = BalancedAdam(model)
    inside, steps, start = 0.0, 0, 0.0
    for step, batch in enumerate(batches(corpus, order, config)):
        if step == 2:                       # two steps warm up
            inside, steps, start = 0.0, 0, time.perf_counter()
        begin = time.perf_counter()
        optimizer.zero_grad()
        out = model(batch)
        out.loss.backward()
        optimizer.step(out.ratio)
        inside, steps = inside + time.perf_counter() - begin, steps + 1
    total = time.perf_counter() - start
    return dict(shape=shape.name, conversations=conversations, utterances=corpus.num_utterances, steps=steps, seconds=total,
                outside_seconds=total - inside, outside_share=(total - inside) / total)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="steps with and without the profiler, each (default 7)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    parser.add_argument("-k", default="", help="only the cases whose name holds this")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")
    facts = machine.facts(options.device)   # before anything runs: the load at the start
    chosen = [case for case in CASES if options.k in case.group]
    if options.device == "cuda":
        rows, passes = [measure_kernels(case, options.rounds) for case in chosen], []
    else:
        rows = [row for case in chosen for row in measure_case(case, options.rounds)]
        # As many conversations as the data sets train on, or fewer of the same lengths: a pass of some seconds.
        passes = [preparation(IEMOCAP, 120, (20, 78)), preparation(MELD, 400, (2, 17))]
    report.write(options.results / report.slug(facts["device"]) / "profile.json", {
        "kind": "profile", "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "environment": facts,
        "preparation": passes}, rows)
    return report.main(["--results", str(options.results)])


if __name__ == "__main__":
    sys.exit(main())
