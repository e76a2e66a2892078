"""Corpora of conversations: one file format, readers of the field's pickles, a synthetic corpus.

Everything here needs numpy alone; `Corpus.batch` needs torch.
"""

from ._unpickle import restricted_load
from .corpus import MODALITIES, SPLITS, Corpus
from .errors import CorpusError
from .known import CLASS_COUNTS, CLASS_NAMES, MELD_DEV_IDS, bin_scores
from .readers import KINDS, open_corpus, read
from .synthetic import synthetic_corpus

__all__ = [
    "CLASS_COUNTS",
    "CLASS_NAMES",
    "KINDS",
    "MELD_DEV_IDS",
    "MODALITIES",
    "SPLITS",
    "Corpus",
    "CorpusError",
    "bin_scores",
    "open_corpus",
    "read",
    "restricted_load",
    "synthetic_corpus",
]
