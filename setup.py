"""Packages and the mapping of the top-level folder `kernels/` to `ada2i_fast.kernels`."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["ada2i_fast", "ada2i_fast.*"]) + ["ada2i_fast.kernels"],
    package_dir={"ada2i_fast": "ada2i_fast", "ada2i_fast.kernels": "kernels"},
)
