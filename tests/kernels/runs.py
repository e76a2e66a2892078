"""Runs cases of Triton in processes of their own, under the interpreter or on a GPU: triton_cases.py, and the layer's of test_afw_layer.py."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).with_name("triton_cases.py")
QUICK, SLOW = (SCRIPT, "--cases", "quick"), (SCRIPT, "--cases", "slow")
LAYER = (Path(__file__).parents[1] / "ops" / "test_afw_layer.py",)
EARLY = "_ada2i_cases"           # where pytest's config holds `Run`s that began before its tests did, by their commands
CORES = min(16, os.cpu_count() or 1)
NICE = ["nice"] if shutil.which("nice") else []      # behind the other tests, which take longer in their one process


def keys(table: str) -> list[str]:
    """Names in a table of the script, which must not be imported by tests: it switches Triton to its interpreter."""
    for node in ast.parse(SCRIPT.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == table:
            return [key.value for key in node.value.keys if key is not None]
    raise KeyError(table)


def claim(path: Path) -> bool:
    """Whether no process has claimed this before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Run:
    """A script's cases, shared by processes of one thread each: it `claim`s in the folder --claims, and prints a line of JSON for each."""

    def __init__(self, *command: str | Path, processes: int = CORES) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._command, self._processes = command, []
        self.fill(processes)

    def fill(self, processes: int = CORES) -> None:
        """So many of them from now on; what has begun goes on."""
        folder = Path(self._folder.name)
        for i in range(len(self._processes), processes):
            with open(folder / f"out.{i}", "w") as out, open(folder / f"err.{i}", "w") as err:
                self._processes.append(subprocess.Popen([*NICE, sys.executable, *self._command, "--claims", folder / "claims"], stdout=out, stderr=err))

    def results(self) -> dict[str, list]:
        """The cases' checks."""
        found, folder = {}, Path(self._folder.name)
        for i, process in enumerate(self._processes):
            assert process.wait() == 0, (folder / f"err.{i}").read_text()[-4000:]
            found |= {line["case"]: line["checks"] for line in map(json.loads, (folder / f"out.{i}").read_text().splitlines())}
        return found

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._folder.cleanup()


def results(*command: str | Path, config: object = None) -> dict[str, list]:
    """config: pytest's, which may hold the run."""
    run = getattr(config, EARLY, {}).get(command) or Run(*command)
    try:
        run.fill()
        return run.results()
    finally:
        run.stop()


def beyond(checks: list) -> list:
    return [check for check in checks if not check[1] <= check[2]]
