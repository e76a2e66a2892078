"""The parts of the model on packed rows, each usable alone."""

from .encoder import LSTMEncoder, TransformerEncoder
from .feature_weighting import FeatureWeighting
from .modality_weighting import ModalityWeighting

__all__ = ["FeatureWeighting", "LSTMEncoder", "ModalityWeighting", "TransformerEncoder"]
