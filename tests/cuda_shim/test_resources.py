"""The built library holds every architecture, and no kernel spills or grows.

Another compiler than the table's counts registers differently: then only spills fail. After a change that is meant to take more,
`python tests/cuda_shim/cuda_resources.py` writes the table anew.
"""

from __future__ import annotations

import json

import cuda_resources as resources
import pytest

from ada2i_fast import cuda


@pytest.fixture(scope="module")
def built():
    if not cuda.PATH.exists():
        pytest.skip(f"the CUDA library was not built (no nvcc found?): {cuda.PATH.name} is not there")
    if resources.cuobjdump() is None:
        pytest.skip("no cuobjdump in a CUDA toolkit, on PATH or in triton")
    return resources.read(cuda.PATH)


TABLE = json.loads(resources.TABLE.read_text())
COMPILER = TABLE.pop("compiler")


def test_table_is_complete():
    """The same kernels everywhere, each op in each of its element types."""
    assert set(TABLE) == set(resources.ARCHITECTURES)
    kernels = set(TABLE["sm_80"])
    assert all(set(TABLE[architecture]) == kernels for architecture in TABLE)
    typed = {name.partition("<")[0] for name in kernels if name.endswith(("<Float32>", "<Tf32>", "<Float16>", "<Bfloat16>"))}
    assert typed == {"project_kernel", "map_kernel", "map_backward_kernel", "input_kernel", "weight_kernel", "mapping_kernel",
                     "mapping_backward_kernel"}
    assert len(kernels) == 4 * len(typed) + 2 * 3 + 7


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_against_table(built, architecture):
    if architecture not in built:
        pytest.skip(f"the library was built without {architecture}")
    assert set(built[architecture]) == set(TABLE[architecture])
    same_compiler = resources.compiler(cuda.PATH) == COMPILER
    for kernel, now in built[architecture].items():
        assert now["stack"] == 0 and now["local"] == 0, f"{kernel} spills on {architecture}: {now}"
        before = TABLE[architecture][kernel]
        assert not same_compiler or all(now[key] <= before[key] for key in before), \
            f"{kernel} grew on {architecture}: {before} -> {now}"
