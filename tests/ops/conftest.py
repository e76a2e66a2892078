"""The CPU library's tiers, and the ways to it, as fixtures; and what is begun before all tests, for it takes a minute in processes of its own."""

from __future__ import annotations

import os

import pytest

from ada2i_fast import cpu, node
from afw_cases import by_way_of


EARLY = "_ada2i_layer"           # where pytest's config holds an InterpretedLayer


def _interpreted(item) -> bool:
    return "interpreted_layer" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items):
    items.sort(key=_interpreted)


def pytest_collection_finish(session):
    config, found = session.config, [item for item in session.items if _interpreted(item)]
    if found and len(session.items) > 1 and (os.cpu_count() or 1) > 1 and not config.option.collectonly and not hasattr(config, "workerinput"):
        setattr(config, EARLY, found[0].module.InterpretedLayer())


def pytest_unconfigure(config):
    if layer := getattr(config, EARLY, None):
        layer.stop()


@pytest.fixture
def interpreted_layer(request):
    layer = getattr(request.config, EARLY, None) or request.module.InterpretedLayer()
    yield layer
    layer.stop()


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
