"""A corpus made of nothing: conversations with planted emotions, one dominant modality and two weak ones."""

from __future__ import annotations

import numpy as np

from .corpus import Corpus
from .errors import CorpusError

CLASS_NAMES = ["calm", "sad", "angry", "frustrated", "happy", "excited"]

# How far apart each modality puts the classes, in standard deviations of its per-feature noise. Text has one direction for calm and
# one for sad, and one for each *pair* angry/frustrated and happy/excited: it cannot tell a pair's members apart. Audio can for the
# first pair, visual, more weakly, for the second. What text leaves open is in the modalities that text drowns during training.
_TEXT, _AUDIO, _VISUAL = 4.5, 3.0, 2.4
_GENERAL_AUDIO, _GENERAL_VISUAL = 1.1, 0.5
_NUISANCE = 1.5  # spread of a speaker's own constant offset in audio and visual, one direction of each


def synthetic_corpus(
    seed: int = 0,
    conversations: int = 120,
    *,
    min_length: int = 5,
    max_length: int = 20,
    widths: dict[str, int] | None = None,
    inertia: float = 0.6,
    name: str = "synthetic",
) -> Corpus:
    """Two speakers per conversation, six emotions that each speaker keeps with probability ``inertia`` from turn to turn.

    conversations: C, at least 10; 70 % train, 10 % dev, the rest test.
    min_length, max_length: utterances per conversation, uniform in between, both included.
    widths: features per utterance by modality, at least 8 each; default t 96, a 48, v 64.

    The features are noise of spread 1 plus the class means described in the source. The same arguments give the same corpus
    (numpy's PCG64). Raises `CorpusError` for arguments out of range.
    """
    widths = {"t": 96, "a": 48, "v": 64} if widths is None else dict(widths)
    if conversations < 10:
        raise CorpusError(f"conversations: expected at least 10, got {conversations}")
    if not 1 <= min_length <= max_length:
        raise CorpusError(
            f"min_length, max_length: expected 1 <= min_length <= max_length, got {min_length} and {max_length}"
        )
    if sorted(widths) != ["a", "t", "v"] or min(widths.values()) < 8:
        raise CorpusError(f"widths: expected t, a and v of at least 8 each, got {widths}")
    if not 0 <= inertia < 1:
        raise CorpusError(f"inertia: expected 0 <= inertia < 1, got {inertia}")

    rng = np.random.Generator(np.random.PCG64(seed))
    directions = {m: np.linalg.qr(rng.standard_normal((widths[m], 8)))[0].T for m in "tav"}  # 8 orthonormal rows each
    means = _means(directions)

    lengths = rng.integers(min_length, max_length + 1, conversations)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels, speakers, voices = [], [], []
    for length in lengths:
        who = _turns(rng, length)
        fresh = rng.integers(0, len(CLASS_NAMES), length)
        kept = rng.random(length) < inertia
        mood = {}
        for turn in range(length):
            speaker = int(who[turn])
            mood[speaker] = mood[speaker] if kept[turn] and speaker in mood else int(fresh[turn])
            labels.append(mood[speaker])
        speakers.append(who)
        voices.append(rng.standard_normal((2, 2))[who])
    labels, speakers, voices = np.array(labels), np.concatenate(speakers), np.concatenate(voices)

    features = {}
    for m in "tav":
        x = means[m][labels] + rng.standard_normal((len(labels), widths[m]))
        if m != "t":
            x += _NUISANCE * voices[:, "av".index(m), None] * directions[m][7]
        features[m] = x.astype(np.float32)

    first, second = int(0.7 * conversations), int(0.7 * conversations) + max(1, int(0.1 * conversations))
    return Corpus(
        name=name,
        features=features,
        offsets=offsets,
        labels=labels,
        speakers=speakers,
        conversation_ids=[f"conversation{c:04d}" for c in range(conversations)],
        split=["train" if c < first else "dev" if c < second else "test" for c in range(conversations)],
        class_names=CLASS_NAMES,
        source=f"synthetic corpus, seed {seed}; split 70/10/20 in order of generation",
        speaker_names=["A", "B"],
    )


def _means(directions: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Class means [6, d_m] per modality."""
    t, a, v = (directions[m] for m in "tav")
    text = _TEXT * t[[0, 1, 2, 2, 3, 3]]
    audio = _GENERAL_AUDIO * a[:6]
    audio[2] += 0.5 * _AUDIO * a[6]
    audio[3] -= 0.5 * _AUDIO * a[6]
    visual = _GENERAL_VISUAL * v[:6]
    visual[4] += 0.5 * _VISUAL * v[6]
    visual[5] -= 0.5 * _VISUAL * v[6]
    return {"t": text, "a": audio, "v": visual}


def _turns(rng: np.random.Generator, length: int) -> np.ndarray:
    """Who speaks: the other one takes over after four turns in five. int64 [length] of 0 and 1."""
    return (np.cumsum(rng.random(length) < 0.8) + rng.integers(0, 2)) % 2
