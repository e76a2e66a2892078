"""The interpreter's cases, half of what the tests take: beside the others, on the cores that those, of one thread mostly, leave."""

from __future__ import annotations

from runs import CORES, EARLY, QUICK, SLOW, Run


def _interpreted(item) -> bool:
    return item.path.name == "test_triton_interpreter.py"


def pytest_collection_modifyitems(items):
    items.sort(key=_interpreted)


def pytest_collection_finish(session):
    config, found = session.config, [item for item in session.items if _interpreted(item)]
    if CORES > 1 and len(found) < len(session.items) and not config.option.collectonly and not hasattr(config, "workerinput"):
        wanted = {SLOW if item.get_closest_marker("slow") else QUICK for item in found}
        setattr(config, EARLY, {options: Run(*options, processes=CORES // 2) for options in sorted(wanted)})


def pytest_unconfigure(config):
    for run in getattr(config, EARLY, {}).values():
        run.stop()
