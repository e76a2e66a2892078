"""The interpreter's cases, half of what the tests take: beside the others, on the cores that those, of one thread mostly, leave."""

from __future__ import annotations

from runs import CORES, EARLY, LAYER, QUICK, SLOW, Run


def _command(item) -> tuple | None:
    """What the item waits for."""
    if item.path.name == "test_triton_interpreter.py":
        return SLOW if item.get_closest_marker("slow") else QUICK
    return LAYER if item.name == "test_triton_layer_is_the_two_ops" else None


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _command(item) is not None)


def pytest_collection_finish(session):
    config, found = session.config, [command for item in session.items if (command := _command(item))]
    if CORES > 1 and len(found) < len(session.items) and not config.option.collectonly and not hasattr(config, "workerinput"):
        setattr(config, EARLY, {command: Run(*command, processes=CORES // 2) for command in dict.fromkeys(found)})


def pytest_unconfigure(config):
    for run in getattr(config, EARLY, {}).values():
        run.stop()
