"""What is fixed about the corpora of the field: class names, score bins, official splits."""

from __future__ import annotations

import numpy as np

from .errors import CorpusError

#: Class names in label order; the key is ``dataset`` + number of classes.
CLASS_NAMES: dict[str, list[str]] = {
    "iemocap6": ["hap", "sad", "neu", "ang", "exc", "fru"],
    "iemocap4": ["hap", "sad", "neu", "ang"],
    "meld7": ["neu", "sup", "fea", "sad", "joy", "dis", "ang"],
    # The released table of these names is scrambled; these follow the bins of `bin_scores`.
    "mosei7": [
        "strong negative",
        "negative",
        "weak negative",
        "neutral",
        "weak positive",
        "positive",
        "strong positive",
    ],
    "mosei2": ["negative", "positive"],
    "mosi7": [
        "strong negative",
        "negative",
        "weak negative",
        "neutral",
        "weak positive",
        "positive",
        "strong positive",
    ],
    "mosi2": ["negative", "positive"],
}

#: Class counts each dataset is used with, the default first.
CLASS_COUNTS: dict[str, tuple[int, ...]] = {"iemocap": (6, 4), "meld": (7,), "mosei": (7, 2), "mosi": (2, 7)}

#: Dialogue ids of MELD's official development set in the features that merge it into the training ids.
MELD_DEV_IDS = range(1039, 1153)


def bin_scores(scores: np.ndarray, num_classes: int) -> np.ndarray:
    """Sentiment scores in [-3, 3], any shape, to classes (int64, same shape).

    7 classes: below -2, [-2, -1), [-1, 0), 0, (0, 1], (1, 2], above 2.
    2 classes: below 0 is 0 (negative), 0 and above is 1 (positive).

    Raises `CorpusError` for any other ``num_classes``.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if num_classes == 2:
        return (scores >= 0).astype(np.int64)
    if num_classes == 7:
        below = np.searchsorted([-2.0, -1.0, 0.0], scores, side="right")  # -2 belongs to [-2, -1)
        above = 4 + np.searchsorted([1.0, 2.0], scores, side="left")  # 1 belongs to (0, 1]
        return np.where(scores > 0, above, below).astype(np.int64)
    raise CorpusError(f"num_classes: sentiment scores can be binned into 2 or 7 classes, not {num_classes}")
