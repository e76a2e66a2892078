"""The fixture `record`: measures a group with its first test, interleaved (measure.py), and gives each test its share."""

from __future__ import annotations

import gc
import sys
import time
import traceback

import pytest
import torch

from ada2i_fast import backends

from . import implementations, machine, measure, report
from .cases import Case, floor_seconds, work


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"], default=None, help="where to measure; a GPU if there is one")
    parser.addoption("--rounds", type=int, default=None, help="interleaved rounds per group; by default as many as fit into 2.5 s, 15 (7) to 60")
    parser.addoption("--tf32", action="store_true", help="float32 matrix products in TF32 (GPU)")


def pytest_configure(config):
    if config.getoption("--device") is None:
        config.option.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.getoption("--tf32"):
        torch.set_float32_matmul_precision("high")


def pytest_generate_tests(metafunc):
    """Each bench file lists its groups as CASES (or SCALING); the device says who competes."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.function.cases
        pairs = [(case, name) for case in cases for name in case.implementations(metafunc.config.getoption("--device"))]
        metafunc.parametrize(("case", "implementation"), pairs,
                             ids=["-".join((case.group.replace(" / ", "-").replace(" ", "_"), name)) for case, name in pairs])


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Statistics without the samples and the recorder's own settings: small enough to be committed."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
        row.pop("options", None)
        row.pop("params", None)


def measure_group(case: Case, names: list[str], device: str, rounds: int | None = None) -> dict[str, dict | Exception]:
    """{implementation: {"samples", "extra_info"}, or what kept it from being measured}."""
    outcomes: dict[str, dict | Exception] = {}
    exact = implementations.exact(case, device)
    textbook, where = measure.error(implementations.build(case, "textbook", device).result(), exact)
    products = "tf32" if device == "cuda" and case.dtype == "float32" and backends.tf32() else case.dtype
    competitors, info = {}, {}
    for name in names:
        try:
            start = time.perf_counter()
            competitor = implementations.build(case, name, device)
            found = None
            if name == "textbook":
                found, place = textbook, where
            elif name != "compiled" or case.mode == "evaluation":
                found, place = measure.error(competitor.result(), exact)
            if found is not None:
                measure.assert_correct(name, found, place, textbook, products)
            saved = None
            if case.mode == "training":
                saved = measure.saved_bytes(competitor.forward, competitor.free)
            competitor.run()                # as a training step: not all that can go wrong does so without dropout
            competitors[name] = competitor
            info[name] = {"error_float64": found, "saved_bytes": saved, "preparation_seconds": round(time.perf_counter() - start, 2)}
        except Exception as reason:         # this implementation's test reports it, the others go on
            outcomes[name] = reason
    del exact
    gc.collect()

    minimum = 3 if case.shape.utterances > 50_000 else 7 if case.op == "model" or case.sweep else 15
    samples = measure.interleaved({name: c.run for name, c in competitors.items()}, device, rounds=rounds, minimum=minimum) if competitors else {}
    operations, touched = work(case)
    rate, bandwidth = machine.matrix_rate(device, case.dtype), machine.bandwidth(device)
    floor = floor_seconds(operations, touched, rate, bandwidth)
    medians = {name: measure.spread(s)[0] for name, s in samples.items()}
    for name, s in samples.items():
        median, iqr = measure.spread(s)
        outcomes[name] = {"samples": s, "extra_info": {
            **machine.facts(device), "implementation": name, "op": case.op, "shape": case.shape.name, "mode": case.mode,
            "dtype": case.dtype, "preset": case.preset, "sweep": case.sweep, "at": case.at, "utterances": case.shape.utterances,
            "median": median, "min": min(s), "iqr": iqr, "rounds": len(s), **info[name],
            **{f"ratio_to_{peer}": medians[peer] / median for peer in report.PEERS if peer in medians},
            "operations": operations, "bytes": touched, "matrix_rate": rate, "bandwidth": bandwidth, "floor_seconds": floor,
            "share_of_floor": floor / median}}
    return outcomes


@pytest.fixture(scope="session")
def measured_groups():
    return {}


@pytest.fixture
def record(request, benchmark, measured_groups):
    def record(case: Case, implementation: str) -> None:
        if case not in measured_groups:
            competing = [item.callspec.params["implementation"] for item in request.session.items
                         if hasattr(item, "callspec") and item.callspec.params.get("case") == case]
            torch.compiler.reset()          # a group's compiled code is of no use to the next
            rounds = 1 if benchmark.disabled else request.config.getoption("--rounds")
            try:
                measured_groups[case] = measure_group(case, competing, request.config.getoption("--device"), rounds)
            except Exception as reason:     # nobody measures the group again
                measured_groups[case] = dict.fromkeys(competing, reason)
            for name, outcome in measured_groups[case].items():
                if isinstance(outcome, Exception) and not isinstance(outcome, implementations.Unavailable):
                    # At once, past pytest's capture, and from where: a run that is stopped has no summary.
                    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                        print(f"\n{case.group} / {name}:", file=sys.stderr)
                        traceback.print_exception(outcome)
        outcome = measured_groups[case][implementation]
        if isinstance(outcome, implementations.Unavailable):
            benchmark.skipped = True
            pytest.skip(str(outcome))
        if isinstance(outcome, Exception):
            raise outcome
        samples = iter(outcome["samples"])
        benchmark.group = case.group
        benchmark.extra_info.update(outcome["extra_info"])
        benchmark.pedantic(lambda: measure.clock.advance(next(samples)), rounds=len(outcome["samples"]))

    return record
