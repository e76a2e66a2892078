"""The synthetic corpus: the same each time, and what it plants can be found."""

import numpy as np
import pytest

from ada2i_fast.data import CorpusError, synthetic_corpus


def test_same_seed_same_corpus():
    a, b, c = synthetic_corpus(5), synthetic_corpus(5), synthetic_corpus(6)
    for m in "tav":
        np.testing.assert_array_equal(a.features[m], b.features[m])
    np.testing.assert_array_equal(a.labels, b.labels)
    assert a.labels.tolist() != c.labels.tolist()


def test_sizes():
    corpus = synthetic_corpus(0)
    assert [len(corpus.conversations(s)) for s in ("train", "dev", "test")] == [84, 12, 24]
    assert corpus.widths == {"t": 96, "a": 48, "v": 64} and corpus.num_classes == 6
    assert corpus.lengths.min() >= 5 and corpus.lengths.max() <= 20
    assert set(corpus.speakers) == {0, 1} and np.bincount(corpus.labels).min() > 100


def test_emotions_persist_per_speaker():
    def kept(corpus):
        same = total = 0
        for c in range(corpus.num_conversations):
            rows = slice(*corpus.offsets[c : c + 2])
            for s in (0, 1):
                own = corpus.labels[rows][corpus.speakers[rows] == s]
                same, total = same + (own[1:] == own[:-1]).sum(), total + len(own) - 1
        return same / total

    assert kept(synthetic_corpus(0, 300)) == pytest.approx(0.6 + 0.4 / 6, abs=0.04)
    assert kept(synthetic_corpus(0, 300, inertia=0.0)) == pytest.approx(1 / 6, abs=0.04)


@pytest.fixture(scope="module")
def accuracy():
    corpus = synthetic_corpus(1)
    train, test = corpus.rows(corpus.conversations("train")), corpus.rows(corpus.conversations("test"))

    def probe(modalities, classes=None):
        x = np.concatenate([corpus.features[m] for m in modalities], axis=1)
        xs, ys, xt, yt = x[train], corpus.labels[train], x[test], corpus.labels[test]
        if classes is not None:
            a, b = np.isin(ys, classes), np.isin(yt, classes)
            xs, ys, xt, yt = xs[a], ys[a], xt[b], yt[b]
        # A ridge regression onto the classes: linear, in closed form.
        xs, xt = np.c_[xs, np.ones(len(xs))].astype(float), np.c_[xt, np.ones(len(xt))]
        w = np.linalg.solve(xs.T @ xs + 10 * np.eye(xs.shape[1]), xs.T @ np.eye(6)[ys])
        return ((xt @ w).argmax(1) == yt).mean()

    return probe


def test_text_dominates_and_the_others_complement_it(accuracy):
    t, a, v = accuracy("t"), accuracy("a"), accuracy("v")
    assert t > a + 0.05 > v + 0.15 and v > 1 / 6 + 0.08
    assert accuracy("tav") > t + 0.15
    assert accuracy("ta") > t + 0.08 and accuracy("tv") > t + 0.05


def test_each_pair_is_open_to_one_modality_only(accuracy):
    anger, joy = (2, 3), (4, 5)
    assert accuracy("t", anger) < 0.65 and accuracy("t", joy) < 0.65
    assert accuracy("a", anger) > 0.85 and accuracy("v", joy) > 0.75
    assert accuracy("v", anger) < 0.75


@pytest.mark.parametrize(
    "options, message",
    [
        ({"conversations": 3}, "conversations: expected at least 10, got 3"),
        ({"min_length": 0}, "min_length, max_length"),
        ({"min_length": 9, "max_length": 8}, "min_length, max_length"),
        ({"widths": {"t": 20}}, "widths: expected t, a and v"),
        ({"widths": {"t": 20, "a": 4, "v": 9}}, "widths: expected t, a and v"),
        ({"inertia": 1.0}, "inertia"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(CorpusError, match=message):
        synthetic_corpus(**options)
