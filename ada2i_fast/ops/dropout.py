"""Counter-based dropout: which elements are kept is a function of a seed and their place, so backward recomputes it.

Philox4x32-10 (Salmon et al., SC 2011), key = the low and high 32 bits of the seed. The element in row n and column d of
stream j takes word d % 4 of the block with counter (d // 4, n low 32 bits, n high 32 bits, j) and is kept where that word,
as an unsigned integer, is at least round(p 2^32). Kept elements are multiplied by 1 / (1 - p).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keep_mask", "threshold"]

_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Words below this value are dropped: round(p 2^32), at most 2^32 - 1."""
    return min(round(p * 2.0 ** 32), _LOW)


def keep_mask(seed: Tensor, stream: int, rows: int, width: int, p: float) -> Tensor:
    """bool [rows, width], True where the element is kept with probability 1 - p.

    seed: int64 scalar tensor or [1], on the device of the result. stream: a number below 2^32 that tells apart the
    tensors that share a seed (the modality's position).
    """
    return philox_words(seed, stream, range(rows), width) >= threshold(p)


def philox_words(seed: Tensor, stream: int, rows: range | int, width: int) -> Tensor:
    """The words of some rows: int64 [rows, width], or [width] for one row."""
    device = seed.device
    seed = seed.reshape(())
    blocks = -(-width // 4)
    first, count = (rows.start, len(rows)) if isinstance(rows, range) else (rows, 1)
    n = torch.arange(first, first + count, device=device)[:, None]
    d = torch.arange(blocks, device=device)[None, :]
    key = [seed & _LOW, (seed >> 32) & _LOW]
    c0, c1, c2, c3 = torch.broadcast_tensors(d, n & _LOW, n >> 32, torch.full_like(n, stream))
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(key[0] + 0x9E3779B9) & _LOW, (key[1] + 0xBB67AE85) & _LOW]
    words = torch.stack((c0, c1, c2, c3), dim=-1).reshape(count, 4 * blocks)[:, :width]
    return words if isinstance(rows, range) else words[0]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in 16-bit halves: int64 has no room for the product itself."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b
    total = high + (low >> 16)
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)
