"""Every case of triton_cases.py: the Triton kernels under the interpreter, against float64."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("ada2i_fast.kernels")

if triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
    pytest.skip("the interpreter of Triton 3.6 needs NumPy below 2.4", allow_module_level=True)

import encoder_cases  # noqa: E402

SCRIPT = Path(__file__).with_name("triton_cases.py")


def keys(table: str) -> list[str]:
    """Names in a table of the script, which must not be imported here: it switches Triton to its interpreter."""
    for node in ast.parse(SCRIPT.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == table:
            return [key.value for key in node.value.keys if key is not None]
    raise KeyError(table)


CASES = ["dropout", "locate", "empty", "reasons", "strides", "large-scores", "offsets", *keys("RING"), *keys("MAPPING"),
         "fusion-zeros", *keys("FUSION"), *encoder_cases.FUSED, *encoder_cases.ATTENTION]


def results(*options: str) -> dict[str, list]:
    """The cases' checks; each runs on one thread, so a process per core shares them."""
    parts = os.cpu_count() or 1
    with ThreadPoolExecutor(parts) as pool:
        runs = list(pool.map(lambda part: subprocess.run(
            [sys.executable, SCRIPT, *options, "--part", str(part), str(parts)], capture_output=True, text=True,
            env={**os.environ, "TRITON_INTERPRET": "1"}), range(parts)))
    for run in runs:
        assert run.returncode == 0, run.stderr[-4000:]
    return {line["case"]: line["checks"] for run in runs for line in map(json.loads, run.stdout.splitlines())}


def beyond(checks: list) -> list:
    return [check for check in checks if not check[1] <= check[2]]


@pytest.fixture(scope="module")
def quick() -> dict[str, list]:
    return results()


@pytest.mark.parametrize("case", CASES)
def test_interpreted(quick, case):
    assert quick[case] and not beyond(quick[case])


def test_every_case_is_named(quick):
    assert set(quick) == set(CASES)


@pytest.mark.slow
def test_interpreted_all():
    """Every rank in every dtype, a dialogue of 10,000 utterances, many dialogues."""
    found = results("--slow")
    assert len(found) > len(CASES)
    assert not {case: beyond(checks) for case, checks in found.items() if beyond(checks)}
