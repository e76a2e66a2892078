"""Packages, the mapping of the top-level folder `kernels/` to `ada2i_fast.kernels`, and the native libraries."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))
from build_tools import native  # noqa: E402


class BuildLibraries(build_ext):
    """Plain shared libraries for ctypes in the place of Python extensions."""

    def _folder(self) -> Path:
        return (native.ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "ada2i_fast" / "lib"

    def run(self) -> None:
        native.build(self._folder().resolve(), native.ROOT / "build" / "native")

    def get_outputs(self) -> list[str]:
        return [str(self._folder() / name) for name in ("libada2i_cpu.so", "libada2i_torch.so", "libada2i_cuda.so", "build_info.json")
                if (self._folder() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    packages=find_packages(include=["ada2i_fast", "ada2i_fast.*"]) + ["ada2i_fast.kernels"],
    package_dir={"ada2i_fast": "ada2i_fast", "ada2i_fast.kernels": "kernels"},
    # Its presence makes setuptools run build_ext and give the wheel the tag of a platform.
    ext_modules=[Extension("ada2i_fast.lib", sources=[])],
    cmdclass={"build_ext": BuildLibraries},
)
