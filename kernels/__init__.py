"""Triton kernels, one file per op. Imported by `ada2i_fast.ops` only once an input asks for this backend."""
