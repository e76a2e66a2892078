"""Functional operations on packed rows. Each file holds one op: its mathematics, its backends and its gradient."""

from .afw_layer import afw_layer
from .attention_mapping import attention_mapping
from .cosine_fusion import cosine_fusion
from .dialogue_attention import DialogueOffsets, dialogue_attention
from .dropout import keep_mask
from .encoder_layer import encoder_layer, encoder_layers
from .head_losses import head_losses
from .linear import linear
from .tensor_ring import tensor_ring

__all__ = ["DialogueOffsets", "afw_layer", "attention_mapping", "cosine_fusion", "dialogue_attention", "encoder_layer", "encoder_layers",
           "head_losses", "keep_mask", "linear", "tensor_ring"]
