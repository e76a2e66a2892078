"""The textbook: Ada2I in plain PyTorch, padded, every tensor of the paper materialised. Slow, and the measure of all else.

Equation numbers are those of the paper (arXiv 2408.12895). It uses nothing from `ada2i_fast.ops`.
"""

from .attention_mapping import attention_mapping
from .balance import disparity_ratio, modulation_coefficients
from .balanced_adam import balanced_step
from .cosine_fusion import cosine_fusion
from .model import Ada2I
from .tensor_ring import tensor_ring

__all__ = ["Ada2I", "attention_mapping", "balanced_step", "cosine_fusion", "disparity_ratio", "modulation_coefficients",
           "tensor_ring"]
