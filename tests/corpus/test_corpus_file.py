"""The corpus in memory and its file."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ada2i_fast.data import Corpus, CorpusError, open_corpus, synthetic_corpus


def small(**changes):
    """Three conversations of 2, 3 and 1 utterances."""
    rng = np.random.default_rng(0)
    parts = dict(
        name="small",
        features={
            "t": rng.standard_normal((6, 4)).astype(np.float32),
            "v": rng.standard_normal((6, 3)).astype(np.float32),
        },
        offsets=np.array([0, 2, 5, 6]),
        labels=np.array([0, 1, 2, 1, 0, 2]),
        speakers=np.array([0, 1, 0, 0, 1, 0]),
        conversation_ids=["one", "zwei", "três"],
        split=["train", "dev", "test"],
        class_names=["x", "y", "z"],
        source="by hand",
        utterance_ids=[f"u{i}" for i in range(6)],
        speaker_names=["A", "B"],
    )
    parts.update(changes)
    return Corpus(**parts)


@pytest.fixture(scope="module")
def synthetic():
    return synthetic_corpus(seed=3, conversations=20, widths={"t": 12, "a": 8, "v": 10})


def same(a, b):
    assert a.modalities == b.modalities
    for m in a.modalities:
        assert b.features[m].dtype == np.float32
        np.testing.assert_array_equal(a.features[m].view(np.uint32), b.features[m].view(np.uint32))
    for what in ("offsets", "labels", "speakers", "conversation_ids", "split", "utterance_ids"):
        x, y = getattr(a, what), getattr(b, what)
        assert (x is None) == (y is None), what
        if x is not None:
            np.testing.assert_array_equal(x, y)
    for what in ("name", "class_names", "speaker_names", "source"):
        assert getattr(a, what) == getattr(b, what), what


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"labels": None}, {"speakers": None, "speaker_names": []}, {"utterance_ids": None}, {"split": ["", "", None]}],
)
def test_round_trip_is_exact(tmp_path, mmap, changes):
    corpus = small(**changes)
    corpus.features["t"][0, 0] = -0.0
    corpus.features["t"][0, 1] = 1e-42  # denormal
    corpus.save(tmp_path / "c.ada2i")
    same(corpus, Corpus.load(tmp_path / "c.ada2i", mmap=mmap))
    same(corpus, open_corpus(tmp_path / "c.ada2i", mmap=mmap))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    width=st.integers(1, 9),
    seed=st.integers(0, 9),
    names=st.text("aé☃😀", max_size=5),
)
def test_round_trip_of_any_shape(tmp_path_factory, lengths, width, seed, names):
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    corpus = Corpus(
        "any" + names,
        {"a": rng.standard_normal((n, width))},
        np.cumsum([0, *lengths]),
        rng.integers(0, 2, n),
        None,
        [f"{names}{i}" for i in range(len(lengths))],
        ["train"] * len(lengths),
        ["no", "yes" + names],
    )
    path = tmp_path_factory.mktemp("any") / "c.ada2i"
    corpus.save(path)
    same(corpus, Corpus.load(path))


def test_arrays_are_mapped_aligned_and_private(tmp_path, synthetic):
    path = tmp_path / "c.ada2i"
    synthetic.save(path)
    before = path.read_bytes()
    loaded = Corpus.load(path)
    for x in [*loaded.features.values(), loaded.offsets, loaded.labels]:
        base = x
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
        assert x.ctypes.data % 64 == 0
    loaded.features["t"][:] = 0
    del loaded
    assert path.read_bytes() == before


def test_the_file_is_what_the_document_says(tmp_path):
    """Reads docs/corpus.md's layout with nothing but json and slices."""
    import hashlib

    corpus = small()
    corpus.save(tmp_path / "c.ada2i")
    raw = (tmp_path / "c.ada2i").read_bytes()
    assert raw[:8] == b"\x89ADA2I\r\n" and raw[8:12] == b"\x01\0\0\0" and raw[24:32] == bytes(8)
    header_size = int.from_bytes(raw[12:16], "little")
    assert int.from_bytes(raw[16:24], "little") == len(raw)
    assert hashlib.blake2b(raw[:32] + raw[64:], digest_size=32).digest() == raw[32:64]
    header = json.loads(raw[64 : 64 + header_size])
    arrays = {e["name"]: e for e in header["arrays"]}
    t = arrays["features.t"]
    got = np.frombuffer(raw[t["offset"] : t["offset"] + t["nbytes"]], t["dtype"]).reshape(t["shape"])
    np.testing.assert_array_equal(got, corpus.features["t"])
    s = arrays["split"]
    assert raw[s["offset"] : s["offset"] + 3] == b"\0\1\2"
    assert all(e["offset"] % 64 == 0 for e in header["arrays"])


def written(tmp_path, edit):
    path = tmp_path / "c.ada2i"
    small().save(path)
    raw = bytearray(path.read_bytes())
    path.write_bytes(edit(raw))
    return path


@pytest.mark.parametrize("cut", [1, 64, 200])
def test_truncated(tmp_path, cut):
    path = written(tmp_path, lambda raw: raw[:-cut])
    for verify in (True, False):
        with pytest.raises(CorpusError, match="c.ada2i is truncated: .* bytes, expected"):
            Corpus.load(path, verify=verify)


def test_truncated_in_the_prologue(tmp_path):
    path = written(tmp_path, lambda raw: raw[:40])
    with pytest.raises(CorpusError, match="truncated"):
        Corpus.load(path)


def test_any_flipped_byte_is_found(tmp_path):
    path = tmp_path / "c.ada2i"
    small().save(path)
    raw = path.read_bytes()
    for position in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[position] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(CorpusError, match="c.ada2i"):
            Corpus.load(path)


def test_flipped_byte_in_the_payload_is_a_checksum_error(tmp_path):
    def edit(raw):
        raw[-70] ^= 1
        return raw

    with pytest.raises(CorpusError, match="checksum does not match"):
        Corpus.load(written(tmp_path, edit))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04abc", b"\x80\x04}.", b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_foreign_files(tmp_path, content):
    path = tmp_path / "c.ada2i"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match="c.ada2i is not an ada2i corpus: it starts with"):
        open_corpus(path)


def test_newer_version(tmp_path):
    def edit(raw):
        raw[8] = 9
        return raw

    with pytest.raises(CorpusError, match="has schema version 9, this package reads version 1"):
        Corpus.load(written(tmp_path, edit))


def test_trailing_bytes(tmp_path):
    with pytest.raises(CorpusError, match="not whole"):
        Corpus.load(written(tmp_path, lambda raw: raw + b"x"))


def test_no_such_file(tmp_path):
    with pytest.raises(CorpusError, match="nothing.ada2i cannot be read: No such file"):
        Corpus.load(tmp_path / "nothing.ada2i")


def rewritten(tmp_path, change):
    """A file whose header says something else, the checksum made to fit."""
    import hashlib

    def edit(raw):
        size = int.from_bytes(raw[12:16], "little")
        header = json.loads(raw[64 : 64 + size])
        change(header)
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size
        raw[64 : 64 + size] = text.ljust(size)
        raw[32:64] = hashlib.blake2b(bytes(raw[:32] + raw[64:]), digest_size=32).digest()
        return raw

    return written(tmp_path, edit)


def entry(header, name):
    return next(e for e in header["arrays"] if e["name"] == name)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h: entry(h, "labels").update(offset=0), "does not fit"),
        (lambda h: entry(h, "labels").update(offset=1 << 40), "does not fit"),
        (lambda h: entry(h, "labels").update(shape=[7]), "does not fit"),
        (lambda h: entry(h, "labels").update(shape=[-6]), "has shape"),
        (lambda h: entry(h, "labels").update(dtype="|O"), "has dtype '|O'"),
        (lambda h: entry(h, "labels").update(name="split"), "occurs twice"),
        (lambda h: h.pop("class_names"), "header cannot be understood"),
        (lambda h: h.update(class_names="xyz"), "expected a list of strings"),
        (lambda h: h["arrays"].remove(entry(h, "offsets")), "header cannot be understood"),
        (
            lambda h: h.update(class_names=["x", "y"]),
            "conversation 'zwei', utterance 0 .u2.: label 2 is out of range 0 to 1",
        ),
    ],
)
def test_lying_headers(tmp_path, change, message):
    with pytest.raises(CorpusError, match="c.ada2i.*" + message.replace("|", r"\|")):
        Corpus.load(rewritten(tmp_path, change))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.ada2i"
    small().save(path)
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CorpusError, match="c.ada2i cannot be written: No space left"):
        small(name="other").save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.ada2i"]


def test_save_refuses_what_became_invalid(tmp_path):
    corpus = small()
    corpus.features["t"][3, 1] = np.nan
    with pytest.raises(CorpusError, match="nan"):
        corpus.save(tmp_path / "c.ada2i")
    assert os.listdir(tmp_path) == []


def bad_features(value, row=3, modality="v"):
    corpus = small()
    features = {m: x.copy() for m, x in corpus.features.items()}
    features[modality][row, 1] = value
    return features


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"features": bad_features(np.nan)}, "conversation 'zwei', utterance 1 (u3): feature 1 of modality 'v' is nan"),
        (
            {"features": bad_features(np.inf, 5, "t")},
            "conversation 'três', utterance 0 (u5): feature 1 of modality 't' is inf",
        ),
        ({"features": {}}, "features: expected a non-empty dictionary"),
        ({"features": {"x": np.zeros((6, 2))}}, "expected modalities among t, a, v, got 'x'"),
        (
            {"features": {"t": np.zeros((6, 2)), "a": np.zeros((5, 2))}},
            "features['a']: expected 6 rows, the sum of the conversation lengths, got 5",
        ),
        ({"features": {"t": np.zeros((6, 0))}}, "width 0"),
        ({"features": {"t": np.zeros(6)}}, "expected 2 dimensions, got shape (6,)"),
        ({"features": {"t": np.full((6, 1), "a")}}, "expected float32"),
        ({"offsets": [0, 2, 2, 6]}, "conversation 'zwei' is empty"),
        ({"offsets": [0, 5, 2, 6]}, "conversation 'zwei' has -3 utterances"),
        ({"offsets": [1, 2, 5, 6]}, "expected the first to be 0, got 1"),
        ({"offsets": [0, 2, 5, 7]}, "expected 7 rows"),
        ({"offsets": [0, 2, 6]}, "conversation_ids: expected 2, one per conversation, got 3"),
        ({"offsets": [0]}, "expected at least one conversation"),
        ({"labels": [0, 1, 3, 1, 0, 2]}, "conversation 'zwei', utterance 0 (u2): label 3 is out of range 0 to 2"),
        ({"labels": [0, -1, 1, 1, 0, 2]}, "conversation 'one', utterance 1 (u1): label -1"),
        ({"labels": [0.5] * 6}, "labels: expected int64, got float64"),
        ({"labels": [0, 1]}, "labels: expected 6 rows"),
        ({"speakers": [0, 1, 2, 0, 1, 0]}, "conversation 'zwei', utterance 0 (u2): speaker 2 is out of range 0 to 1"),
        ({"speakers": [0, 1]}, "speakers: expected 6 rows"),
        ({"conversation_ids": ["one", "one", "two"]}, "'one' occurs 2 times"),
        ({"split": ["train", "train"]}, "split: expected 3, one per conversation, got 2"),
        ({"split": ["train", "valid", "test"]}, "conversation 'zwei': expected split train, dev or test, got 'valid'"),
        ({"class_names": ["x", "x", "z"]}, "distinct names"),
        ({"utterance_ids": ["u"]}, "utterance_ids: expected 6 rows"),
    ],
)
def test_bad_corpora(changes, message):
    with pytest.raises(CorpusError) as error:
        small(**changes)
    assert message in str(error.value) and str(error.value).startswith("small: ") and "\n" not in str(error.value)


def test_sizes_and_table(synthetic):
    assert synthetic.num_conversations == 20 and synthetic.num_utterances == len(synthetic.labels)
    assert synthetic.widths == {"t": 12, "a": 8, "v": 10} and synthetic.num_classes == 6
    table = synthetic.describe()
    assert "train" in table and "14" in table and "t 12, a 8, v 10" in table and "calm" in table
    np.testing.assert_array_equal(synthetic.conversations("dev"), [14, 15])
    np.testing.assert_array_equal(synthetic.conversations(), np.arange(20))
    with pytest.raises(CorpusError, match="split: expected train, dev or test, got 'valid'"):
        synthetic.conversations("valid")


@pytest.mark.parametrize("index", [[3], [4, 5, 6], [6, 2, 11], [5, 5]])
def test_batches_hold_the_conversations_in_order(synthetic, index):
    torch = pytest.importorskip("torch")
    batch = synthetic.batch(index)
    where = [range(synthetic.offsets[c], synthetic.offsets[c + 1]) for c in index]
    rows = [r for part in where for r in part]
    assert batch.offsets.tolist() == np.cumsum([0] + [len(part) for part in where]).tolist()
    assert batch.labels.tolist() == synthetic.labels[rows].tolist()
    for m in "tav":
        assert batch.features[m].dtype == torch.float32
        np.testing.assert_array_equal(batch.features[m].numpy(), synthetic.features[m][rows])
    shared = batch.features["t"].data_ptr() == synthetic.features["t"].ctypes.data + 48 * rows[0]
    assert shared == (list(rows) == list(range(rows[0], rows[-1] + 1)))


def test_batch_modalities_and_bad_arguments(synthetic):
    pytest.importorskip("torch")
    assert tuple(synthetic.batch([0], modalities="vt").features) == ("v", "t")
    assert replace(synthetic, labels=None).batch([1, 0]).labels is None
    with pytest.raises(CorpusError, match="modalities: small has t, v, not 'a'"):
        small().batch([0], modalities="ta")
    with pytest.raises(CorpusError, match="expected conversation indices 0 to 19"):
        synthetic.batch([20])


def test_relabel_drops_utterances_and_emptied_conversations():
    cut = small().relabel([0, 1, -1], ["x", "y"])
    assert cut.conversation_ids.tolist() == ["one", "zwei"] and cut.lengths.tolist() == [2, 2]
    assert cut.labels.tolist() == [0, 1, 1, 0] and cut.utterance_ids.tolist() == ["u0", "u1", "u3", "u4"]
    np.testing.assert_array_equal(cut.features["t"], small().features["t"][[0, 1, 3, 4]])
    assert cut.split.tolist() == ["train", "dev"]


@pytest.mark.parametrize("seed", [12, 7])
def test_random_tenth_is_the_released_shuffle(synthetic, seed):
    import random

    corpus = synthetic.with_split("none")
    pool = [c for c, s in enumerate(corpus.split) if s != "test"]
    order = list(pool)
    random.seed(seed)
    random.shuffle(order)
    dev = corpus.with_split("random_tenth", seed).conversations("dev")
    assert dev.tolist() == sorted(order[: int(len(pool) * 0.1)])
    assert f"seed {seed}" in corpus.with_split("random_tenth", seed).source


def test_first_tenth_none_and_official(synthetic):
    assert synthetic.with_split("first_tenth").conversations("dev").tolist() == [0]
    none = synthetic.with_split("none")
    assert len(none.conversations("dev")) == 0 and len(none.conversations("train")) == 16
    assert len(none.conversations("test")) == 4
    with pytest.raises(CorpusError, match="no official development split"):
        none.with_split("official")
    with pytest.raises(CorpusError, match="dev_split: expected official"):
        none.with_split("half")
