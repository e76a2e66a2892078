"""The interpreter's cases, half of what the tests take: beside the others, on the cores that those, of one thread mostly, leave."""

from __future__ import annotations

from runs import CORES, EARLY, Run


def _waits(item) -> bool:
    return "quick" in getattr(item, "fixturenames", ()) and item.path.name == "test_triton_interpreter.py"


def pytest_collection_modifyitems(items):
    items.sort(key=_waits)


def pytest_collection_finish(session):
    others = not all(map(_waits, session.items))
    if CORES > 1 and others and any(map(_waits, session.items)) and not session.config.option.collectonly and not hasattr(session.config, "workerinput"):
        setattr(session.config, EARLY, Run(processes=CORES - 1))


def pytest_unconfigure(config):
    if run := getattr(config, EARLY, None):
        run.stop()
