"""The CPU library's tiers as a fixture."""

from __future__ import annotations

import pytest

from ada2i_fast import cpu


@pytest.fixture(params=cpu.tiers() if cpu.why_not() is None else [])
def tier(request):
    """The instruction set that the test runs with: each that this processor has, or those that the test names."""
    before = cpu.tier()
    cpu.set_tier(request.param)
    yield request.param
    cpu.set_tier(before)
