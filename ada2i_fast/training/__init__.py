"""Training, evaluation and prediction: `fit`, `evaluate`, checkpoints and result files. Needs the extra `train`."""

from .checkpoint import load, model_of
from .files import RunError
from .graph import GraphedStep, StepResult
from .loop import PRECISIONS, batches, fit, resolve_device, split
from .metrics import Predictions, evaluate, report, scores

__all__ = ["GraphedStep", "PRECISIONS", "Predictions", "RunError", "StepResult", "batches", "evaluate", "fit", "load", "model_of", "report", "resolve_device", "scores", "split"]
