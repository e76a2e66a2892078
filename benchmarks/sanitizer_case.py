"""A tiny forward and backward of each GPU backend, and an optimizer step, for compute-sanitizer (gpu_check.sh): odd sizes, an empty
dialogue."""

from __future__ import annotations

import sys

import torch

from ada2i_fast import Ada2I, Ada2IConfig, BalancedAdam, DialogueBatch
from ada2i_fast.modules import FeatureWeighting
from ada2i_fast.modules.encoder import TransformerEncoder


def optimizer_step(device: str) -> str | None:
    """Two steps of a model with noise in its gradients, by the optimizer's kernels; or why not."""
    torch.manual_seed(0)
    config = Ada2IConfig.released("meld", input_widths={"a": 10, "t": 36, "v": 15}, hidden_dim=19, tensor_rank=5, feedforward_dim=37)
    model = Ada2I(config).to(device)
    batch = DialogueBatch({m: torch.randn(23, d) for m, d in config.input_widths.items()}, torch.tensor([0, 7, 20, 23]),
                          torch.arange(23) % config.num_classes).to(device)
    optimizer = BalancedAdam(model)
    for _ in range(2):
        optimizer.zero_grad()
        out = model(batch)
        out.loss.backward()
        if reason := optimizer.why_not_fused(out.ratio):
            return reason
        optimizer.step(out.ratio)
    return None


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
    if reason := optimizer_step(device):
        print(f"balanced_adam: {reason}")
    else:
        ran += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} cases ran")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
