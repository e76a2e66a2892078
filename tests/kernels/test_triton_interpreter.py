"""Every case of triton_cases.py: the Triton kernels under the interpreter, against float64."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
pytest.importorskip("ada2i_fast.kernels")

import interpreter  # noqa: E402

if reason := interpreter.why_not():
    pytest.skip(reason, allow_module_level=True)

import encoder_cases  # noqa: E402
from runs import QUICK, SLOW, beyond, keys, results  # noqa: E402

CASES = ["dropout", "reduce", "locate", "empty", "reasons", "strides", "large-scores", "offsets", *keys("RING"), *keys("MAPPING"),
         *keys("LIBRARY_RING"), *keys("LIBRARY_MAPPING"),
         "mapping-counted", "library-mapping-close", "fusion-zeros", *keys("FUSION"), "head-edges", *keys("HEAD"), *encoder_cases.FUSED,
         *encoder_cases.ATTENTION]


@pytest.fixture(scope="module")
def quick(request) -> dict[str, list]:
    return results(*QUICK, config=request.config)


@pytest.mark.parametrize("case", CASES)
def test_interpreted(quick, case):
    assert quick[case] and not beyond(quick[case])


def test_every_case_is_named(quick):
    assert set(quick) == set(CASES)


@pytest.mark.slow
def test_interpreted_slow(request):
    """Every rank, a dialogue of a thousand utterances, many dialogues."""
    found = results(*SLOW, config=request.config)
    assert found and not set(found) & set(CASES)
    assert not {case: beyond(checks) for case, checks in found.items() if beyond(checks)}
