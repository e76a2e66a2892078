"""The CPU library's tiers, and the ways to it, as fixtures."""

from __future__ import annotations

import pytest

from ada2i_fast import cpu, node
from afw_cases import by_way_of


@pytest.fixture(params=cpu.tiers() if cpu.why_not() is None else [])
def tier(request):
    """The instruction set that the test runs with: each that this processor has, or those that the test names."""
    before = cpu.tier()
    cpu.set_tier(request.param)
    yield request.param
    cpu.set_tier(before)


@pytest.fixture(params=["python", pytest.param("node", marks=pytest.mark.skipif(node.why_not() is not None, reason=str(node.why_not())))])
def route(request, monkeypatch):
    """Calls of the op that the test file names NODE by way of Python, and as one (`node`), which then has to take what it gets."""
    with by_way_of(request.param, request.module.NODE, monkeypatch):
        yield request.param
