"""Every layout that is read, written here in small by the tests."""

import pickle
import random
import sys
import types

import numpy as np
import pytest

from ada2i_fast.data import CLASS_NAMES, Corpus, CorpusError, bin_scores, open_corpus, read

WIDTHS = {"t": 6, "a": 4, "v": 5}


def conversations(ids, classes=6, lengths=None, seed=0, style="lists"):
    """The dictionaries by conversation that all the pickles share."""
    rng = np.random.default_rng(seed)
    d = {key: {} for key in ("u", "s", "y", "t", "a", "v", "w")}
    for k, vid in enumerate(ids):
        n = lengths[k] if lengths else 2 + k % 4
        for m, width in WIDTHS.items():
            x = rng.standard_normal((n, width)).astype(np.float32)
            d[m][vid] = {"array": x, "arrays": list(x), "lists": x.tolist()}[style]
        d["s"][vid] = ["M" if i % 2 else "F" for i in range(n)]
        d["y"][vid] = [int(y) for y in rng.integers(0, classes, n)]
        d["u"][vid] = [f"{vid}_{i}" for i in range(n)]
        d["w"][vid] = ["words"] * n
    return d


SES = [f"Ses0{k}F_impro{k:02d}" for k in range(24)]
TRAIN, TEST = SES[:20], SES[20:]


def released(ids=SES, **kwargs):
    d = conversations(ids, **kwargs)
    return {
        "trainVid": ids[:-4],
        "testVid": ids[-4:],
        "speaker": d["s"],
        "label": d["y"],
        "text": d["t"],
        "audio": d["a"],
        "visual": d["v"],
        "sentence": d["w"],
    }


def nine(ids=SES, **kwargs):
    d = conversations(ids, **kwargs)
    return d["u"], d["s"], d["y"], d["t"], d["a"], d["v"], d["w"], ids[:-4], ids[-4:]


def write(tmp_path, data, name="x.pkl", protocol=2):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return path


def check(corpus, d, m="t"):
    """Every conversation has the features, labels and speakers of the dictionaries."""
    for c, vid in enumerate(corpus.conversation_ids):
        key = next(k for k in d[m] if str(k) == vid)
        rows = slice(*corpus.offsets[c : c + 2])
        for m in corpus.modalities:
            np.testing.assert_array_equal(corpus.features[m][rows], np.asarray(d[m][key], np.float32))
        assert corpus.labels[rows].tolist() == list(d["y"][key])


# -- the released dictionaries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["lists", "array", "arrays"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_released_iemocap(tmp_path, style, protocol):
    corpus = read(write(tmp_path, released(style=style), protocol=protocol))
    check(corpus, conversations(SES, style=style))
    assert corpus.class_names == ["hap", "sad", "neu", "ang", "exc", "fru"] and corpus.speaker_names == ["M", "F"]
    assert corpus.speakers[:2].tolist() == [1, 0]
    order = list(TRAIN)
    random.seed(12)
    random.shuffle(order)
    assert corpus.conversation_ids.tolist() == order[2:] + order[:2] + TEST  # what the released loader lists
    assert [len(corpus.conversations(s)) for s in ("train", "dev", "test")] == [18, 2, 4]
    assert "random_tenth, seed 12" in corpus.source
    assert read(tmp_path / "x.pkl", seed=3).conversation_ids.tolist() != corpus.conversation_ids.tolist()


def test_ids_in_a_set_are_sorted(tmp_path):
    data = released()
    data["trainVid"] = set(TRAIN)
    assert read(write(tmp_path, data), dev_split="none").conversation_ids.tolist() == sorted(TRAIN) + TEST


def meld(ids=None, key="speakers"):
    ids = list(range(1153 + 280)) if ids is None else ids
    ids = [i for i in ids if i != 60]
    d = conversations(ids, classes=7, lengths=[1] * len(ids), style="array")
    d["s"] = {vid: [[0, 0, 1, 0]] for vid in ids}
    return d, [i for i in ids if i < 1153], [i for i in ids if i >= 1153]


def test_released_meld_splits(tmp_path):
    d, train, test = meld()
    path = write(
        tmp_path,
        {
            "trainVid": train,
            "testVid": test,
            "speakers": d["s"],
            "label": d["y"],
            "text": d["t"],
            "audio": d["a"],
            "visual": d["v"],
            "sentence": d["w"],
        },
    )
    official = read(path)
    assert official.name == "meld" and official.class_names == CLASS_NAMES["meld7"] and set(official.speakers) == {2}
    assert [int(v) for v in official.conversation_ids[official.conversations("dev")]] == list(range(1039, 1153))
    assert [len(official.conversations(s)) for s in ("train", "dev", "test")] == [1038, 114, 280]
    first = read(path, dev_split="first_tenth")
    assert [int(v) for v in first.conversation_ids[first.conversations("dev")]] == train[:115]
    check(official, d)


def test_meld_without_its_ids_says_so(tmp_path):
    d, train, test = meld(list(range(100)))
    path = write(
        tmp_path,
        {
            "trainVid": train,
            "testVid": [],
            "speakers": d["s"],
            "label": d["y"],
            "text": d["t"],
            "audio": d["a"],
            "visual": d["v"],
        },
    )
    with pytest.raises(CorpusError, match="dev_split: expected MELD's 114 official .* found 0; choose first_tenth"):
        read(path)


def mosei(labels):
    ids = [f"vid{k}" for k in range(12)]
    d = conversations(ids, classes=2)
    if labels == "scores":
        rng = np.random.default_rng(1)
        d["y"] = {v: [[float(x), 0.0] for x in rng.integers(-30, 31, len(d["y"][v])) / 10] for v in ids}
    return ids, d


def test_released_mosei(tmp_path):
    ids, d = mosei("classes")
    seven = {v: [6 - y for y in d["y"][v]] for v in ids}
    path = write(
        tmp_path,
        {
            "trainVid": ids[:6],
            "valVid": ids[6:8],
            "testVid": ids[8:],
            "speaker": d["s"],
            "text": d["t"],
            "audio": d["a"],
            "visual": d["v"],
            "label": {"7class": seven, "2class": d["y"], "happiness": d["y"]},
        },
    )
    corpus = read(path)
    assert corpus.num_classes == 7 and set(corpus.labels) == {5, 6}
    assert corpus.conversation_ids[corpus.conversations("dev")].tolist() == ids[6:8] and set(
        corpus.speakers or [0]
    ) == {0}
    for options in ({"emotion": "2class"}, {"num_classes": 2}):
        two = read(path, **options)
        assert two.class_names == ["negative", "positive"]
        check(two, d)
    assert read(path, emotion="happiness").class_names == ["0", "1"]
    with pytest.raises(CorpusError, match="emotion: expected one of 7class, 2class, happiness, got 'joy'"):
        read(path, emotion="joy")


# -- the tuples --------------------------------------------------------------------------------------------------------


def test_iemocap_features(tmp_path):
    corpus = read(write(tmp_path, nine(), "IEMOCAP_features.pkl"))
    check(corpus, conversations(SES))
    assert corpus.name == "iemocap" and corpus.utterance_ids[0] == f"{corpus.conversation_ids[0]}_0"
    with pytest.raises(CorpusError, match="iemocap has no official development split"):
        read(tmp_path / "IEMOCAP_features.pkl", dev_split="official")


def test_four_way_drops_utterances_then_conversations(tmp_path):
    d = nine(lengths=[3] * 24)
    d[2][TEST[0]] = [4, 5, 4]
    d[2][TEST[1]] = [4, 0, 5]
    path = write(tmp_path, d)
    six, four = read(path), read(path, num_classes=4)
    assert four.class_names == ["hap", "sad", "neu", "ang"]
    assert TEST[0] in six.conversation_ids and TEST[0] not in four.conversation_ids
    c = four.conversation_ids.tolist().index(TEST[1])
    assert four.lengths[c] == 1 and four.utterance_ids[four.offsets[c]] == f"{TEST[1]}_1"
    assert four.num_utterances == (six.labels < 4).sum()
    np.testing.assert_array_equal(four.features["a"], six.features["a"][six.labels < 4])
    kept = set(four.conversation_ids)
    assert [v for v in six.conversation_ids[six.conversations("dev")] if v in kept] == four.conversation_ids[
        four.conversations("dev")
    ].tolist()


def test_four_way_file(tmp_path):
    path = write(tmp_path, nine(classes=4))
    assert read(path).class_names == CLASS_NAMES["iemocap4"] == read(path, num_classes=4).class_names
    assert read(path, num_classes=6).num_classes == 6


def test_meld_tuples(tmp_path):
    d, train, test = meld()
    sentiment = {v: [0] for v in d["y"]}
    ten = (d["u"], d["s"], d["y"], d["t"], d["a"], d["v"], d["w"], train, test, sentiment)
    corpus = read(write(tmp_path, ten))
    assert corpus.name == "meld" and corpus.modalities == ("t", "a", "v") and len(corpus.conversations("dev")) == 114
    check(corpus, d)
    without_visual = (d["u"], d["s"], d["y"], d["t"], d["a"], d["w"], train, test, sentiment)
    corpus = read(write(tmp_path, without_visual))
    assert corpus.modalities == ("t", "a")
    check(corpus, d)
    with pytest.raises(CorpusError, match="modality 'v' was asked for, but this MELD nine-tuple has only t, a"):
        read(tmp_path / "x.pkl", modalities="tv")


def roberta(ids, seed=5):
    rng = np.random.default_rng(seed)
    return [
        {v: rng.standard_normal((len(y), 9)).astype(np.float32) for v, y in conversations(ids)["y"].items()}
        for _ in range(4)
    ]


def test_roberta_tuples_and_text_file(tmp_path):
    d, layers = conversations(SES), roberta(SES)
    path = write(
        tmp_path, (d["s"], d["y"], *layers, d["w"], TRAIN[:18], TEST, TRAIN[18:]), "iemocap_features_roberta.pkl"
    )
    corpus = read(path, text_layer=2)
    check(corpus, d | {"t": layers[1]})
    assert corpus.conversation_ids[corpus.conversations("dev")].tolist() == TRAIN[18:]
    joined = read(write(tmp_path, nine()), text_file=path, text_layer="concat")
    assert joined.widths == {"t": 36, "a": 4, "v": 5} and "roberta" in joined.source
    mean = read(tmp_path / "x.pkl", text_file=path)
    check(mean, d | {"t": {v: np.mean([x[v] for x in layers], axis=0) for v in SES}})
    twelve = (d["u"], d["s"], d["y"], *layers, d["a"], d["v"], d["w"], TRAIN, TEST)
    check(read(write(tmp_path, twelve), text_layer=4), d | {"t": layers[3]})
    assert read(tmp_path / "x.pkl", modalities="av").modalities == ("a", "v")
    eleven = (d["s"], d["y"], d["y"], *layers, d["w"], TRAIN[:18], TEST, TRAIN[18:])
    assert read(write(tmp_path, eleven), text_layer=1).name == "meld"
    with pytest.raises(CorpusError, match="expected a RoBERTa pickle for text_file, got nine-tuple"):
        read(tmp_path / "x.pkl", text_file=write(tmp_path, nine(), "y.pkl"))


def test_mosei_ten_tuple(tmp_path):
    ids, d = mosei("scores")
    frames = {v: [np.stack([np.float32(x), np.float32(x) * 3]) for x in d["a"][v]] for v in ids}
    path = write(tmp_path, (d["u"], d["s"], d["y"], d["t"], frames, d["v"], d["w"], ids[:6], ids[6:8], ids[8:]))
    corpus = read(path)
    assert corpus.name == "mosei" and corpus.num_classes == 7
    scores = np.concatenate([[y[0] for y in d["y"][v]] for v in ids])
    np.testing.assert_array_equal(corpus.labels, bin_scores(scores, 7))
    np.testing.assert_allclose(
        corpus.features["a"], 2 * np.concatenate([np.float32(d["a"][v]) for v in ids]), rtol=1e-6
    )
    two = read(path, num_classes=2)
    np.testing.assert_array_equal(two.labels, scores >= 0)
    d["y"][ids[3]][1] = [0.0]
    path = write(tmp_path, (d["u"], d["s"], d["y"], d["t"], frames, d["v"], d["w"], ids[:6], ids[6:8], ids[8:]))
    dropped = read(path, num_classes=2, neutral="drop")
    assert dropped.num_utterances == len(scores) - sum(y[0] == 0 for v in ids for y in d["y"][v]) < len(scores)
    d["y"][ids[3]][1] = [3.5]
    with pytest.raises(
        CorpusError, match="conversation 'vid3', utterance 1: sentiment score 3.5 is out of range -3 to 3"
    ):
        read(write(tmp_path, (d["u"], d["s"], d["y"], d["t"], frames, d["v"], d["w"], ids[:6], ids[6:8], ids[8:])))


def test_bins():
    scores = [-3, -2.01, -2, -1.5, -1, -0.01, 0, 0.01, 1, 1.01, 2, 2.01, 3]
    assert bin_scores(scores, 7).tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 6]
    assert bin_scores(scores, 2).tolist() == [0] * 6 + [1] * 7
    assert bin_scores(-0.0, 7) == 3
    with pytest.raises(CorpusError, match="2 or 7 classes, not 5"):
        bin_scores(scores, 5)


def test_seven_bins_to_two(tmp_path):
    ids = [f"v{k}" for k in range(12)]
    d = nine(ids, classes=7)
    path = write(tmp_path, d)
    with pytest.raises(CorpusError, match="x.pkl: the data set cannot be told from this nine-tuple; choose dataset"):
        read(path)
    seven, two = read(path, dataset="mosei"), read(path, dataset="mosei", num_classes=2)
    np.testing.assert_array_equal(two.labels, seven.labels >= 3)
    assert read(path, dataset="mosei", num_classes=2, neutral="drop").num_utterances == (seven.labels != 3).sum()
    assert read(path, dataset="other").num_classes == 7


# -- COGMEN, CORECT ----------------------------------------------------------------------------------------------------


def records(make):
    d = conversations(SES, style="array")
    made = [make(vid=v, y=d["y"][v], s=d["s"][v], t=d["t"][v], a=d["a"][v], v=d["v"][v], w=d["w"][v]) for v in SES]
    return d, {"train": made[:17], "dev": made[17:20], "test": made[20:]}


def test_corect(tmp_path):
    d, data = records(
        lambda vid, y, s, t, a, v, w: dict(vid=vid, speakers=s, labels=y, audio=a, visual=v, text=t, sentence=w)
    )
    corpus = read(write(tmp_path, data))
    check(corpus, d)
    assert corpus.conversation_ids.tolist() == SES and [
        len(corpus.conversations(s)) for s in ("train", "dev", "test")
    ] == [17, 3, 4]
    data["train"][1]["vid"] = data["train"][0]["vid"]
    assert read(write(tmp_path, data)).conversation_ids[1] == SES[0] + "#2"


def test_cogmen_samples(tmp_path, monkeypatch):
    module = types.ModuleType("cogmen.Sample")
    module.Sample = type("Sample", (), {"__module__": "cogmen.Sample"})
    monkeypatch.setitem(sys.modules, "cogmen", types.ModuleType("cogmen"))
    monkeypatch.setitem(sys.modules, "cogmen.Sample", module)

    def make(vid, y, s, t, a, v, w):
        sample = module.Sample()
        sample.__dict__.update(
            vid=vid, speaker=s, label=y, text=w, audio=a, visual=v, sentence=w, sbert_sentence_embeddings=t
        )
        return sample

    d, data = records(make)
    check(read(write(tmp_path, data)), d)


# -- npz ---------------------------------------------------------------------------------------------------------------


def npz(tmp_path, name="mosi.npz", **changes):
    rng = np.random.default_rng(0)
    arrays = dict(
        text=rng.standard_normal((40, 3)),
        audio=rng.standard_normal((40, 2)),
        visual=rng.standard_normal((40, 4)),
        label=rng.integers(0, 2, 40),
        speaker=np.zeros(40, int),
        conversation_offsets=np.arange(0, 41, 4),
        conversation_id=[f"c{k}" for k in range(10)],
        split=["train", "test"] * 5,
        utterance_id=[f"u{k}" for k in range(40)],
        label_names=["negative", "positive"],
    )
    arrays.update(changes)
    np.savez(tmp_path / name, **{k: v for k, v in arrays.items() if v is not None})
    return tmp_path / name


def test_npz(tmp_path):
    corpus = open_corpus(npz(tmp_path))
    assert corpus.name == "mosi" and corpus.class_names == ["negative", "positive"]
    assert [len(corpus.conversations(s)) for s in ("train", "dev", "test")] == [4, 1, 5] and "seed 12" in corpus.source
    official = read(npz(tmp_path, split=["train"] * 6 + ["dev"] * 2 + ["test"] * 2))
    assert official.conversations("dev").tolist() == [6, 7]
    assert read(npz(tmp_path, audio=None)).modalities == ("t", "v")
    assert read(npz(tmp_path, label=None, label_names=None)).labels is None


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"audio": None}, {"modalities": "ta"}, "modality 'a' (audio) is missing"),
        ({"conversation_id": None}, {}, "array 'conversation_id' is missing"),
        ({"label_names": None}, {}, "array 'label_names' is missing"),
        ({}, {"num_classes": 7}, "num_classes: expected 2"),
        ({"conversation_id": np.array([{}] * 10, dtype=object)}, {}, "not a readable .npz archive of plain arrays"),
        (
            {"text": np.full((40, 3), np.nan)},
            {},
            "conversation 'c0', utterance 0 (u0): feature 0 of modality 't' is nan",
        ),
    ],
)
def test_bad_npz(tmp_path, changes, options, message):
    with pytest.raises(CorpusError) as error:
        read(npz(tmp_path, **changes), **options)
    assert message in str(error.value)


def test_truncated_npz(tmp_path):
    path = npz(tmp_path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CorpusError, match="mosi.npz: not a readable .npz archive"):
        read(path)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def edited(edit):
    data = released(lengths=[3] * 24, style="arrays")
    edit(data)
    return data


def put(data, key, vid, value, u=None):
    if u is None:
        data[key][vid] = value
    else:
        data[key][vid][u] = value


BAD = [
    (lambda d: d.pop("audio"), "modality 'a' (key 'audio') is missing"),
    (lambda d: d.pop("testVid"), "key 'testVid' is missing"),
    (lambda d: d["audio"].pop(SES[3]), f"conversation '{SES[3]}': modality 'a' (audio) is missing"),
    (lambda d: put(d, "text", SES[3], []), f"conversation '{SES[3]}' is empty"),
    (
        lambda d: put(d, "audio", SES[3], np.zeros((2, 4))),
        f"conversation '{SES[3]}': 2 utterances in modality 'a', 3 in 't'",
    ),
    (lambda d: put(d, "audio", SES[3], np.zeros((3, 7))), "modality 'a' has width"),
    (lambda d: put(d, "audio", SES[3], np.zeros(7), 1), f"conversation '{SES[3]}', audio, utterance 1: width 7"),
    (
        lambda d: put(d, "visual", SES[3], "sit", 1),
        f"conversation '{SES[3]}', visual, utterance 1: expected a vector of numbers, got a str",
    ),
    (
        lambda d: put(d, "visual", SES[3], [1, "x"], 1),
        "utterance 1: expected a vector of numbers, got a list holding a str",
    ),
    (lambda d: put(d, "visual", SES[3], [10**400] * 5, 1), "a number too large"),
    (
        lambda d: put(d, "visual", SES[3], np.float32([0, 0, np.nan, 0, 0]), 1),
        f"conversation '{SES[3]}', utterance 1: feature 2 of modality 'v' is nan",
    ),
    (
        lambda d: put(d, "visual", SES[3], np.float64([0, 0, 0, 0, 1e300]), 1),
        f"conversation '{SES[3]}', utterance 1: feature 4 of modality 'v' is inf",
    ),
    (lambda d: put(d, "label", SES[3], [0, 1]), f"conversation '{SES[3]}': 2 labels for 3 utterances"),
    (lambda d: put(d, "label", SES[3], 6, 2), f"conversation '{SES[3]}', utterance 2: label 6 is out of range 0 to 5"),
    (
        lambda d: put(d, "label", SES[3], -1, 2),
        f"conversation '{SES[3]}', utterance 2: label -1 is out of range 0 to 5",
    ),
    (
        lambda d: put(d, "label", SES[3], 0.5, 2),
        f"conversation '{SES[3]}', utterance 2: label 0.5, expected a whole number",
    ),
    (lambda d: put(d, "label", SES[3], float("nan"), 2), f"conversation '{SES[3]}', utterance 2: label nan"),
    (
        lambda d: put(d, "label", SES[3], "hap", 2),
        f"conversation '{SES[3]}', utterance 2: expected a number as label, got a str",
    ),
    (lambda d: d["label"].pop(SES[3]), f"conversation '{SES[3]}': labels missing"),
    (lambda d: put(d, "speaker", SES[3], ["M"]), f"conversation '{SES[3]}': 1 speakers for 3 utterances"),
    (lambda d: d.update(text=[1]), "text: expected a dictionary by conversation, got a list"),
    (lambda d: d.update(trainVid=7), "trainVid: expected a list of conversation ids, got a int"),
    (lambda d: d.update(trainVid=TRAIN + TEST[:1]), f"'{TEST[0]}' occurs 2 times"),
    (lambda d: d.update(trainVid=[], testVid=[]), "expected at least one conversation, got none"),
]


@pytest.mark.parametrize("edit, message", BAD)
def test_bad_contents(tmp_path, edit, message):
    path = write(tmp_path, edited(edit))
    with pytest.raises(CorpusError) as error:
        read(path)
    assert message in str(error.value) and str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "csv"}, "kind: expected one of auto, released, tuple, cogmen, npz, got 'csv'"),
        ({"dataset": "emory"}, "dataset: expected one of auto, iemocap"),
        ({"num_classes": 5}, "num_classes: expected one of 6, 4, got 5"),
        ({"dev_split": "half"}, "dev_split: expected one of auto, official"),
        ({"text_layer": 5}, "text_layer: expected one of mean, concat"),
        ({"labels": "score"}, "labels: expected class for iemocap, got score"),
        ({"neutral": "drop"}, "neutral: 'drop' needs sentiment in two classes"),
        ({"modalities": "tx"}, "modalities: expected distinct names among t, a, v, got t,x"),
        ({"modalities": ""}, "modalities: expected distinct names among t, a, v, got none"),
        ({"emotion": "7class"}, "emotion: only mosei_data.pkl has labels to choose from"),
        ({"kind": "tuple"}, "expected a tuple of dictionaries and id lists, got a dict"),
        ({"kind": "npz"}, "not a readable .npz archive"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(CorpusError) as error:
        read(write(tmp_path, released()), **options)
    assert message in str(error.value)


def test_strange_values_are_one_sentence(tmp_path):
    for key in ("text", "label", "speaker"):
        for value in (
            np.array(None, dtype=object),
            np.zeros((3, 1, 1, 4)),
            {1: 2},
            np.array(["a", "b", "c"]),
            3,
            [None] * 3,
            [[]] * 3,
        ):
            if key == "speaker" and np.shape(value) == (3,) and np.asarray(value).dtype.kind == "U":
                continue  # three names are what speakers may be
            path = write(tmp_path, edited(lambda d: put(d, key, SES[3], value)))
            with pytest.raises(CorpusError, match="x.pkl"):
                read(path)


def test_missing_modality_may_be_left_out(tmp_path):
    data = released()
    del data["audio"]
    assert read(write(tmp_path, data), modalities="tv").modalities == ("t", "v")


@pytest.mark.parametrize("data", [[1, 2], ({},) * 5, {"a": 1}, 7, "text", {}])
def test_unknown_layouts(tmp_path, data):
    with pytest.raises(CorpusError, match="x.pkl: (a tuple of|expected a)"):
        read(write(tmp_path, data))


def test_a_list_nested_in_itself_costs_nothing(tmp_path):
    bomb = [0.0] * 10
    for _ in range(40):
        bomb = [bomb] * 10
    with pytest.raises(CorpusError, match="a list holding a list"):
        read(write(tmp_path, edited(lambda d: put(d, "text", SES[3], bomb))))
    with pytest.raises(CorpusError, match="x.pkl"):
        read(write(tmp_path, edited(lambda d: put(d, "label", SES[3], [bomb] * 3))))
    with pytest.raises(CorpusError, match="x.pkl"):
        read(write(tmp_path, edited(lambda d: put(d, "speaker", SES[3], [bomb] * 3))))
    d, data = records(lambda vid, y, s, t, a, v, w: dict(vid=vid, speakers=s, labels=y, audio=a, visual=v, text=t))
    data["train"][0]["vid"] = bomb
    with pytest.raises(CorpusError, match="train conversation 0: expected a name or number as vid, got a list"):
        read(write(tmp_path, data))
    parts = nine()
    parts[0][SES[1]] = [bomb] * len(parts[0][SES[1]])
    assert read(write(tmp_path, parts)).utterance_ids is None
    d = conversations(SES)
    d["y"] = {v: bomb for v in SES}
    with pytest.raises(CorpusError, match="x.pkl"):
        read(write(tmp_path, (d["u"], d["s"], d["y"], d["t"], d["a"], d["v"], d["w"], TRAIN[:10], TRAIN[10:], TEST)))


def test_open_corpus(tmp_path):
    assert open_corpus("synthetic", seed=4).source.startswith("synthetic corpus, seed 4")
    corpus = open_corpus(write(tmp_path, released()))
    corpus.save(tmp_path / "c.ada2i")
    assert isinstance(open_corpus(tmp_path / "c.ada2i"), Corpus)
    (tmp_path / "c.ada2i").rename(tmp_path / "renamed")
    assert open_corpus(tmp_path / "renamed").name == "iemocap"
    with pytest.raises(CorpusError, match="nothing cannot be read: No such file"):
        open_corpus(tmp_path / "nothing")
    with pytest.raises(CorpusError, match="classes: no such option for synthetic; expected one of seed"):
        open_corpus("synthetic", classes=3)
