"""The benchmarks' own logic: report, floors, collection, the check before timing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

pytest.importorskip("pytest_benchmark")
from ada2i_fast import cpu  # noqa: E402
from benchmarks import cases, implementations, measure, memory, profile, report, run  # noqa: E402

IMPLEMENTATIONS = ["textbook", "algebra", pytest.param("cpu", marks=pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not())))]
TINY = cases.Shape("tiny", "iemocap", (3, 1, 5), (("hidden_dim", 8), ("tensor_rank", 3), ("feedforward_dim", 16)))


def row(implementation: str, median: float, group: str = "afw_layer / tiny / training / float32", **extra) -> dict:
    info = dict(device="Testing Machine", cpu="Testing Machine", cpu_tier="baseline", threads=1, python="3", torch="2", triton=None, commit="abc",
                load_at_start=0.0, implementation=implementation, op="afw_layer", shape="tiny", mode="training", dtype="float32", sweep="", at=0,
                median=median, min=median, iqr=0.1 * median, floor_seconds=1e-3, share_of_floor=1e-3 / median, error_float64=1e-7,
                saved_bytes=2 ** 20, matrix_rate=1e11, bandwidth=1e10, ratio_to_textbook=0.01 / median, **extra)
    return {"group": group, "name": implementation, "stats": {"median": median}, "extra_info": info}


@pytest.fixture
def results(tmp_path):
    """A results folder with a fast and a slow row of ours, and a sweep."""
    raw = {"datetime": "2026-01-01T00:00:00", "benchmarks": [
        row("textbook", 0.01), row("cpu", 0.002), row("textbook", 0.01, "other / group"), row("cpu", 0.02, "other / group"),
        *(row("cpu", 0.001 * n, f"sweep {n}") for n in (1, 2))]}
    for n, each in enumerate(raw["benchmarks"][-2:], 1):
        each["extra_info"].update(sweep="rank", at=n, shape=f"rank {n}")
    folder = tmp_path / "testing-machine"
    folder.mkdir()
    (folder / "default.json").write_text(json.dumps(run.slim(raw)))
    return tmp_path


def test_the_report_shows_ratios_machine_and_slower_rows(results):
    assert report.main(["--results", str(results)]) == 0
    page = (results / "README.md").read_text()
    lines = page.splitlines()
    assert "## Testing Machine: default" in lines
    assert "CPU tier baseline" in page and "torch 2" in page and "commit abc" in page and "100 GFLOP/s float32" in page
    fast, slow = [line for line in lines if line.startswith("| cpu | ")][:2]
    assert "2 ms" in fast and "| 5.00 |" in fast and "50%" in fast and "1.0e-07" in fast and "1 MiB" in fast and "slower" not in fast
    assert "20 ms" in slow and "| 0.50 |" in slow and "**slower**" in slow
    assert "Rows of ours that a peer beats: 1." in lines
    assert "(testing-machine/default.png)" in page and (results / "testing-machine" / "default.png").stat().st_size < 100_000


def test_the_report_shows_peak_memory_and_the_profile(tmp_path):
    environment = row("cpu", 1.0)["extra_info"] | {"device": "Testing Machine", "limits": {"ATEN_CPU_CAPABILITY": "avx2"}}
    folder = tmp_path / "testing-machine"
    report.write(folder / "memory.json", {"kind": "memory", "datetime": "2026-01-01", "environment": environment}, [
        dict(group="model / tiny", implementation=name, peak_bytes=bytes_, of_textbook=bytes_ / 2 ** 22)
        for name, bytes_ in (("textbook", 2 ** 22), ("cpu", 2 ** 20))])
    rows = [dict(case="model / tiny", shape="tiny", dtype="float32", implementation=name, rounds=3, step_seconds=0.8 * whole,
                 watched_seconds=whole, parts={"feature weighting": 0.25 * whole, "everything else": 0.75 * whole}, floors={"feature weighting": 1e-3},
                 matrix_rate=1e11, bandwidth=1e10) for name, whole in (("cpu", 0.01), ("textbook", 0.1))]
    report.write(folder / "profile.json", {"kind": "profile", "datetime": "2026-01-01", "environment": environment, "preparation": [
        dict(shape="tiny", conversations=5, utterances=50, steps=2, seconds=1.0, outside_seconds=0.002, outside_share=0.002)]}, rows)
    assert report.main(["--results", str(tmp_path)]) == 0
    page, performance = ((tmp_path / name).read_text() for name in ("README.md", "performance.md"))
    assert "| model / tiny | cpu | 1 MiB | 25% |" in page and "Limited by `ATEN_CPU_CAPABILITY=avx2`." in page
    assert "| feature weighting | 1 ms | 2.5 ms | 25.0% | 40% | 25 ms | 25.0% | 4% |" in performance
    assert "| everything else | – | 7.5 ms | 75.0% | – | 75 ms | 75.0% | – |" in performance
    assert "10.00 times as fast as the textbook" in performance and "| tiny | 5 | 50 | 2 | 1 s | 2 ms | 0.20% |" in performance


def test_without_results_the_report_says_so(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().err


def test_floor():
    assert cases.floor_seconds(3e9, 2e9, 1e9, 4e9) == 3.5
    # One dialogue of N rows, counted by hand: 2 operations per multiply-add, three passes in training.
    n, d, r = 4, 8, 3
    shape = cases.Shape("one", "iemocap", (n,), (("hidden_dim", d), ("tensor_rank", r)))
    ring = 3 * (n * (4 * d * r + 2 * r * r + r * r * d) + r ** 3)
    evaluation, training = (cases.work(cases.Case("afw_layer", shape, mode)) for mode in ("evaluation", "training"))
    assert evaluation[0] == 2 * ring
    assert training[0] == 2 * 3 * (ring + 3 * n * d * d)
    assert cases.work(cases.Case("tensor_ring", shape))[0] + cases.work(cases.Case("attention_mapping", shape))[0] == training[0]
    parameters = 3 * (4 * d * r + 4 * r + r * r * d + d)
    assert evaluation[1] == 4 * (2 * 3 * n * d + parameters)
    for mode in ("evaluation", "training"):
        case = cases.Case("model", cases.MELD, mode)
        parts = cases.parts(case)
        assert cases.work(case) == (sum(work[0] for work in parts.values()), sum(work[1] for work in parts.values()))
        assert set(parts) <= set(profile.PARTS)
    # Queries, keys and values of the first layer want no gradient of their input: three products of n rows less.
    forward, inputs = (parts[name][0] for name in (profile.FORWARD, profile.INPUT))
    assert forward - inputs == 2 * 96 * 3 * sum(w * w for w in cases.MELD.config().input_widths.values())
    # Published: the scores come from the cosines; released: products of their own, without gradient, and a bias.
    published, released = (cases.work(cases.Case("cosine_fusion", shape, preset=preset)) for preset in ("published", "released"))
    assert published[0] == 2 * 3 * 3 * n * d * 6 and released[0] == 2 * (3 + 1) * 3 * n * d * 6
    assert published[1] == 4 * (3 * 3 * n * d + 2 * n * 6 + 3 * n * 6 + 3 * 3 * d * 6) == released[1] - 4 * 3 * 6
    # The encoders hold about 99 % of the arithmetic, 34 M multiply-adds an utterance (spec, section 5).
    whole = cases.work(cases.Case("model", cases.IEMOCAP, "evaluation"))[0] / 2 / cases.IEMOCAP.utterances
    assert 33e6 < whole < 36e6
    assert cases.IEMOCAP.utterances == 500 and cases.MELD.utterances == 96 and max(cases.MELD.lengths) == 33


def pytest_benchmarks(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_group_collects():
    found = pytest_benchmarks("--collect-only", "-m", "", "--device", "cpu")
    assert found.returncode == 0, found.stdout + found.stderr
    for op in ("tensor_ring", "attention_mapping", "afw_layer", "cosine_fusion", "model"):
        for shape in ("iemocap", "meld", "mosei"):
            for implementation in ("textbook", "algebra", "cpu"):
                assert f"[{op}-{shape}-training-float32-{implementation}]" in found.stdout
    for name in ("afw_layer-iemocap-training-float32-compiled", "model-meld-training-bfloat16-cpu", "100000_utterances", "rank_32", "width_1024",
                 "model-iemocap_released-training", "model-meld_released-training", "model-iemocap-evaluation-float32-cpu",
                 "model-meld-evaluation-float32-cpu"):
        assert name in found.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_what_keeps_a_group_from_being_measured_is_told_at_once():
    found = pytest_benchmarks("-k", "cosine_fusion-meld-training-float32", "--device", "cuda")
    assert found.returncode == 1
    told = found.stderr + found.stdout.split("FAILURES")[0]
    assert "cosine_fusion / meld / training / float32 / textbook:" in told and "in measure_group" in told, found.stdout[:2000]


@pytest.mark.parametrize("op", ["tensor_ring", "attention_mapping", "afw_layer", "cosine_fusion", "model"])
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_competitors_agree_and_run(op, mode):
    case = cases.Case(op, TINY, mode)
    exact = implementations.exact(case, "cpu")
    textbook = implementations.build(case, "textbook", "cpu")
    error, where = measure.error(textbook.result(), exact)
    assert error < 1e-4, where
    competitor = implementations.build(case, "algebra", "cpu")
    found, where = measure.error(competitor.result(), exact)
    measure.assert_correct("algebra", found, where, error, "float32")
    competitor.run()
    if mode == "training":
        assert 0 < measure.saved_bytes(competitor.forward, competitor.free) < 1e9


def test_a_wrong_implementation_is_not_timed():
    case = cases.Case("afw_layer", TINY)
    exact = implementations.exact(case, "cpu")
    result = implementations.build(case, "algebra", "cpu").result()
    for name in ("output0", "gradient of x1", "gradient of attention.lin_att.2.lin.weight"):
        wrong = {**result, name: result[name] * 1.001}
        error, where = measure.error(wrong, exact)
        assert where == name
        with pytest.raises(measure.WrongResult, match=name):
            measure.assert_correct("algebra", error, where, 1e-7, "float32")
    result["output0"] = result["output0"] * float("nan")
    with pytest.raises(measure.WrongResult):
        measure.assert_correct("algebra", *measure.error(result, exact), 1e-7, "float32")
    with pytest.raises(measure.WrongResult, match="expected the tensors"):
        measure.error({}, exact)


def test_rounds_are_interleaved():
    order = []
    samples = measure.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2)
    assert [len(s) for s in samples.values()] == [2, 2]
    runs = "".join(order[4:])               # behind the two warm-up calls of each
    shortened = [runs[0]] + [c for before, c in zip(runs, runs[1:]) if c != before]
    assert shortened == ["a", "b", "a"]     # a b, then b a


def test_saved_bytes_count_a_storage_once():
    x = torch.randn(10, 10, requires_grad=True)

    def forward():
        y = x * x                           # saves x, which is free
        return (y * y[:, :5].sum()).sum()   # saves y

    assert measure.saved_bytes(forward, (x,)) == 400 + 4


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_counting_saved_bytes_leaves_no_graph_behind(name):
    """A node of a parameter that lives on is bound to the stream of its pass, and a CUDA graph of the next one cannot be captured."""
    competitor = implementations.build(cases.Case("model", TINY), name, "cpu")
    parameter = next(p for p in competitor.free if p.requires_grad)

    def forward():
        result = competitor.forward()
        node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        weakref.finalize(node.metadata.setdefault("ends", Ends()), ended.append, True)
        return result

    class Ends:
        """What a node's metadata holds goes with the node."""

    ended = []
    measure.saved_bytes(forward, competitor.free)
    assert ended


def test_an_interrupted_run_keeps_complete_groups(tmp_path, monkeypatch):
    """A terminal and `timeout` interrupt this process too, before pytest has written what it measured."""
    def interrupted(command, **_):
        os.kill(os.getpid(), signal.SIGINT)
        target = next(a for a in command if a.startswith("--benchmark-json="))
        Path(target.partition("=")[2]).write_text(json.dumps({"datetime": "2026-01-01T00:00:00", "benchmarks": [row("cpu", 0.01)]}))
        return 2

    usual = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(run.subprocess, "call", interrupted)
    assert run.main(["--results", str(tmp_path), "--name", "part"]) == 2
    assert json.loads((tmp_path / "testing-machine" / "part.json").read_text())["benchmarks"]
    assert signal.getsignal(signal.SIGINT) is usual


def test_slug():
    assert report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_profile_finds_every_part_and_adds_up(name, dtype):
    """Known parts only, each seen in the step; the products of each kind are as many as the model has weights."""
    case = cases.Case("model", TINY, dtype=dtype)
    competitor = implementations.build(case, name, "cpu")
    for _ in range(2):
        competitor.run()
    counts = {}
    with profile.spans(competitor), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as trace:
        competitor.run()
    for event in trace.events():
        kind = profile.product(event, case)
        counts[kind] = counts.get(kind, 0) + 1
    weights = 3 * (2 * 4 + 1)
    assert [counts[kind] for kind in (profile.FORWARD, profile.INPUT, profile.WEIGHT)] == [weights, weights - 3, weights]
    seconds, parts = profile.profiled(competitor, case)
    expected = set(profile.PARTS) - (set() if dtype == "bfloat16" else {profile.CASTS})
    assert expected <= set(parts) and all(s > 0 for s in parts.values())
    assert sum(parts.values()) == pytest.approx(seconds)
    assert not [hook for module in competitor.model.modules() for hook in module._forward_hooks.values()]


@pytest.mark.skipif(memory.why_not() is not None, reason=str(memory.why_not()))
@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
def test_peak_memory_of_a_training_step():
    """Activations and temporaries at IEMOCAP sizes: at most 40 % of the textbook's. The measure itself is checked by what the textbook has
    to keep: the bytes that autograd saves are a part of it, and most of it.
    """
    case = memory.CASES[0]
    textbook = implementations.build(case, "textbook", "cpu")
    saved = measure.saved_bytes(textbook.forward, textbook.free)
    del textbook
    theirs, ours = (memory.measure(case, name, threads=1) for name in ("textbook", "cpu"))
    assert saved < theirs < 1.25 * saved
    assert ours <= 0.4 * theirs, f"{ours / 2 ** 20:.0f} of {theirs / 2 ** 20:.0f} MiB"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [TINY, cases.MELD], ids=["tiny", "meld"])
def test_steps_are_measured_on_a_gpu(shape, dtype):
    from benchmarks.conftest import measure_group

    names = ["textbook", "triton", "cuda", "graph"]
    outcomes = measure_group(cases.Case("model", shape, dtype=dtype), names, "cuda", 1)
    for name in names:
        if isinstance(outcomes[name], Exception):
            raise outcomes[name]
        assert len(outcomes[name]["samples"]) == 1
