"""Ada2I (ACM MM 2024) made fast: balanced multimodal emotion recognition in conversations."""

from . import ops
from .batch import Ada2IOutput, DialogueBatch
from .config import Ada2IConfig
from .model import Ada2I
from .optim import BalancedAdam

__all__ = ["Ada2I", "Ada2IConfig", "Ada2IOutput", "BalancedAdam", "DialogueBatch", "ops"]
__version__ = "0.1.0"
