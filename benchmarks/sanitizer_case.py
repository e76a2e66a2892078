"""A tiny forward and backward of each GPU backend, for compute-sanitizer (gpu_check.sh): odd sizes, an empty dialogue."""

from __future__ import annotations

import sys

import torch

from ada2i_fast.modules import FeatureWeighting
from ada2i_fast.modules.encoder import TransformerEncoder


def main(device: str = "cuda", names: tuple[str, ...] = ("cuda", "triton")) -> int:
    """Returns 1 if none of the backends could run."""
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    ran = 0
    for backend in names:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            module = FeatureWeighting([19, 19, 19], rank=5, layers=1, dropout=0.5, backend=backend).to(device)
            x = [torch.randn(23, 19, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
            offsets = torch.tensor([0, 7, 7, 20, 23], device=device)
            try:
                out, loss = module(x, offsets)
            except RuntimeError as reason:
                if "cannot serve" not in str(reason):
                    raise
                print(f"{backend}: {reason}")
                continue
            (sum(o.float().square().sum() for o in out) + loss).backward()
            if backend == "triton":     # which is what an encoder takes by itself
                encoder = TransformerEncoder(22, 8, 2, 1, 37, 0.5).to(device, dtype)
                encoder(torch.randn(23, 22, device=device, dtype=dtype), [7, 0, 13, 3]).float().square().sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            ran += 1
    print(f"{ran} cases ran")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
