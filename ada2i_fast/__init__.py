"""Ada2I (ACM MM 2024) made fast: balanced multimodal emotion recognition in conversations."""

from .batch import Ada2IOutput, DialogueBatch
from .config import Ada2IConfig

__version__ = "0.1.0"
