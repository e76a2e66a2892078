"""Readers of the field's feature files. Each turns its layout into one table of dictionaries; `_assemble` packs the table."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._unpickle import restricted_load
from .corpus import MAGIC, Corpus, split_note, tenth
from .errors import CorpusError
from .known import CLASS_COUNTS, CLASS_NAMES, MELD_DEV_IDS, bin_scores
from .synthetic import synthetic_corpus

KINDS = ("auto", "released", "tuple", "cogmen", "npz")
DATASETS = ("auto", "iemocap", "meld", "mosei", "mosi", "other")
DEV_SPLITS = ("auto", "official", "first_tenth", "random_tenth", "none")
TEXT_LAYERS = ("mean", "concat", 1, 2, 3, 4)

_FULL = {"t": "text", "a": "audio", "v": "visual"}


@dataclass
class _Table:
    """A source before packing. Every dictionary is keyed by conversation."""

    kind: str
    dataset: str
    train: list
    test: list
    features: dict[str, dict]
    dev: list | None = None  # what the source itself calls development
    labels: dict | None = None
    speakers: dict | None = None
    utterance_ids: dict | None = None
    frames: bool = False  # an utterance may be frames [L, d], to be averaged
    notes: list[str] = field(default_factory=list)


def open_corpus(path_or_name: str | os.PathLike, **options) -> Corpus:
    """``"synthetic"``: `synthetic_corpus`; a corpus file: `Corpus.load`; anything else: `read`. Options go to the one chosen.

    Raises `CorpusError`.
    """
    if path_or_name == "synthetic":
        return _call(synthetic_corpus, "synthetic", options)
    path = os.fspath(path_or_name)
    if path.endswith(".ada2i") or _head(path, len(MAGIC)) == MAGIC:
        return _call(Corpus.load, path, options, path)
    return _call(read, path, options, path)


def read(
    path: str | os.PathLike,
    kind: str = "auto",
    *,
    dataset: str = "auto",
    num_classes: int | None = None,
    emotion: str | None = None,
    dev_split: str = "auto",
    seed: int = 12,
    modalities: Sequence[str] | None = None,
    text_file: str | os.PathLike | None = None,
    text_layer: str | int = "mean",
    labels: str = "auto",
    neutral: str = "positive",
    name: str | None = None,
) -> Corpus:
    """Reads a feature file into a `Corpus`; conversations come in the order train, dev, test (`npz`: in the file's order).

    kind: ``"released"`` (Ada2I's iemocap.pkl, meld.pkl, mosei_data.pkl), ``"tuple"`` (the DialogueRNN, MMGCN, M3NET family),
        ``"cogmen"`` (COGMEN, CORECT), ``"npz"``, or ``"auto"``: by the contents.
    dataset: ``"iemocap"``, ``"meld"``, ``"mosei"``, ``"mosi"``, ``"other"`` (classes named by number), or ``"auto"``.
    num_classes: IEMOCAP 6 or 4, MOSEI and MOSI 7 or 2; default: what the labels are. IEMOCAP 4 keeps hap, sad, neu and ang
        and drops the other utterances, after the split is made.
    emotion: which labels of mosei_data.pkl, e.g. ``"7class"`` or ``"2class"``; default: by ``num_classes``, else 7class.
    dev_split: ``"official"`` (the source's own, for MELD the 114 dialogues 1039 to 1152), ``"first_tenth"`` or ``"random_tenth"``
        of the training conversations (`Corpus.with_split`), ``"none"``; ``"auto"``: official where there is one, and for MELD;
        else random_tenth.
    seed: of random_tenth; the same cut as the released loader's for the same seed.
    modalities: which of t, a, v to read; default: all that the layout has, and each of them must be there.
    text_file: a RoBERTa pickle of the same conversations, whose vectors replace the text features.
    text_layer: of RoBERTa's four vectors per utterance: their ``"mean"``, ``"concat"`` or one of 1 to 4.
    labels: of MOSEI and MOSI: ``"score"`` (in [-3, 3], to be binned), ``"class"``, or ``"auto"``: scores if any is negative or
        not whole.
    neutral: of two-class sentiment: a score of 0 is ``"positive"``, or ``"drop"``: such utterances are left out.

    Raises `CorpusError` naming the file, the conversation and the utterance, or the option.
    """
    path = os.fspath(path)
    _choice("kind", kind, KINDS)
    _choice("dataset", dataset, DATASETS)
    _choice("dev_split", dev_split, DEV_SPLITS)
    _choice("text_layer", text_layer, TEXT_LAYERS)
    _choice("labels", labels, ("auto", "score", "class"))
    _choice("neutral", neutral, ("positive", "drop"))
    if modalities is not None:
        modalities = tuple(modalities)
        if not modalities or any(m not in _FULL for m in modalities) or len(set(modalities)) != len(modalities):
            raise CorpusError(
                f"modalities: expected distinct names among t, a, v, got {','.join(map(str, modalities)) or 'none'}"
            )
    if dataset in CLASS_COUNTS and num_classes is not None:
        _choice("num_classes", num_classes, CLASS_COUNTS[dataset])

    if kind == "npz" or (kind == "auto" and _head(path, 2) == b"PK"):
        return _at(path, _npz, path, dataset, num_classes, dev_split, seed, modalities, name)
    table = _at(path, _table, restricted_load(path), kind, dataset, num_classes, emotion, text_layer, modalities)
    if text_file is not None:
        if modalities is not None and "t" not in modalities:
            raise CorpusError(f"text_file: expected t among the modalities, got {','.join(modalities)}")
        other = os.fspath(text_file)
        text = _at(other, _table, restricted_load(other), "tuple", dataset, None, None, text_layer, None)
        if "roberta" not in text.kind:
            raise CorpusError(f"{other}: expected a RoBERTa pickle for text_file, got {text.kind}")
        table.features["t"] = text.features["t"]
        table.notes.append(f"text from {os.path.basename(other)}")
    return _at(path, _assemble, table, num_classes, dev_split, seed, labels, neutral, name)


# -- layouts -----------------------------------------------------------------------------------------------------------


def _table(data, kind, dataset, num_classes, emotion, text_layer, modalities) -> _Table:
    if kind == "auto":
        if isinstance(data, dict):
            kind = "released" if "trainVid" in data else "cogmen"
        else:
            kind = "tuple"
    table = {"released": _released, "cogmen": _cogmen, "tuple": _tuple}[kind](
        data, num_classes, emotion, text_layer, modalities
    )
    if dataset != "auto":
        table.dataset = dataset
    if table.dataset == "auto":
        raise CorpusError(
            f"the data set cannot be told from this {table.kind}; choose dataset iemocap, meld, mosei, mosi or other"
        )
    if num_classes is not None and table.dataset in CLASS_COUNTS:
        _choice("num_classes", num_classes, CLASS_COUNTS[table.dataset])
    if modalities is not None:
        missing = [m for m in modalities if m not in table.features]
        if missing:
            raise CorpusError(
                f"modality {missing[0]!r} was asked for, but this {table.kind} has only {', '.join(table.features)}"
            )
        table.features = {m: table.features[m] for m in modalities}
    return table


def _released(data, num_classes, emotion, text_layer, modalities) -> _Table:
    if not isinstance(data, dict):
        raise CorpusError(
            f"expected the released dictionary with trainVid, testVid, text, audio, visual, got a {type(data).__name__}"
        )
    features = {}
    for m, key in _FULL.items():
        if modalities is None or m in modalities:
            features[m] = _mapping(data, key)
    if "valVid" in data:
        dataset = "mosei"
    else:
        dataset = "meld" if "speakers" in data else "iemocap"
    labels = data.get("label")
    if dataset == "mosei" and isinstance(labels, dict):
        default = {None: "7class", 7: "7class", 2: "2class"}.get(num_classes, "7class")
        chosen = emotion or default
        if chosen not in labels:
            raise CorpusError(f"emotion: expected one of {', '.join(map(str, list(labels)[:12]))}, got {chosen!r}")
        labels = labels[chosen]
        if chosen not in ("7class", "2class"):
            dataset = "other"
    elif emotion is not None:
        raise CorpusError(f"emotion: only mosei_data.pkl has labels to choose from, got {emotion!r}")
    speakers = data.get("speakers", data.get("speaker"))
    return _Table(
        kind="released dictionary",
        dataset=dataset,
        train=_ids(data, "trainVid"),
        test=_ids(data, "testVid"),
        dev=_ids(data, "valVid") if "valVid" in data else None,
        features=features,
        labels=None if labels is None else _mapping({"label": labels}, "label"),
        speakers=None if dataset == "mosei" or speakers is None else _mapping({"speakers": speakers}, "speakers"),
    )


def _tuple(data, num_classes, emotion, text_layer, modalities) -> _Table:
    """Tells the tuples apart by which elements are dictionaries (D) and which are lists of ids (I).

    Roles: u utterance ids, s speakers, y labels, t a v features, r the first of four RoBERTa layers.
    """
    if not isinstance(data, (tuple, list)):
        raise CorpusError(f"expected a tuple of dictionaries and id lists, got a {type(data).__name__}")
    shape = "".join(
        "D" if isinstance(x, dict) else "I" if isinstance(x, (list, tuple, set, frozenset, np.ndarray)) else "x"
        for x in data
    )
    d = list(data)
    if shape == "DDDDDDDII":  # IEMOCAP_features.pkl and MOSEI's categorical.p
        roles, dataset, kind = dict(u=0, s=1, y=2, t=3, a=4, v=5, train=7, test=8), "auto", "nine-tuple"
    elif shape == "DDDDDDIID":  # DialogueRNN's MELD, without visual features
        roles, dataset, kind = dict(u=0, s=1, y=2, t=3, a=4, train=6, test=7), "meld", "MELD nine-tuple"
    elif shape == "DDDDDDDIII" and _is_vectors(d[2]):
        roles, dataset, kind = dict(s=0, y=1, r=2, train=7, test=8, dev=9), "auto", "roberta ten-tuple"
    elif shape == "DDDDDDDIII" and all(v in d[0] for v in d[9]):  # the TBJE MOSEI pickle
        roles, dataset, kind = dict(u=0, y=2, t=3, a=4, v=5, train=7, dev=8, test=9), "mosei", "MOSEI ten-tuple"
    elif len(shape) == 10 and shape.startswith("DDDDDDDII"):  # MELD_features_raw1.pkl; its last element is sentiment
        roles, dataset, kind = dict(u=0, s=1, y=2, t=3, a=4, v=5, train=7, test=8), "meld", "MELD ten-tuple"
    elif shape == "DDDDDDDDIII":
        roles, dataset, kind = dict(s=0, y=1, r=3, train=8, test=9, dev=10), "meld", "MELD roberta eleven-tuple"
    elif shape == "DDDDDDDDDDII":
        roles, dataset, kind = dict(u=0, s=1, y=2, r=3, a=7, v=8, train=10, test=11), "auto", "roberta twelve-tuple"
    elif len(shape) == 13 and shape.startswith("DDDDDDDDDDII"):
        roles, dataset, kind = (
            dict(u=0, s=1, y=2, r=3, a=7, v=8, train=10, test=11),
            "meld",
            "MELD roberta thirteen-tuple",
        )
    else:
        raise CorpusError(
            f"a tuple of {len(shape)} elements ({shape}; D a dictionary, I a list, x other) is no known layout"
        )
    train, test = _ids(d, roles["train"]), _ids(d, roles["test"])
    if dataset == "auto" and train and all(isinstance(v, str) and v.startswith("Ses") for v in train):
        dataset = "iemocap"
    dev = _ids(d, roles["dev"]) if "dev" in roles else None
    features, notes = {m: d[roles[m]] for m in _FULL if m in roles}, []
    if "r" in roles and (modalities is None or "t" in modalities):
        features = {"t": _roberta(d[roles["r"] : roles["r"] + 4], train + (dev or []) + test, text_layer), **features}
        notes.append(f"RoBERTa layer {text_layer}")
    return _Table(
        kind=kind,
        dataset=dataset,
        train=train,
        test=test,
        dev=dev,
        features=features,
        labels=d[roles["y"]],
        speakers=d[roles["s"]] if "s" in roles else None,
        utterance_ids=d[roles["u"]] if "u" in roles else None,
        frames=dataset == "mosei",
        notes=notes,
    )


def _cogmen(data, num_classes, emotion, text_layer, modalities) -> _Table:
    if not isinstance(data, dict) or not {"train", "test"} <= set(data):
        keys = ", ".join(map(str, list(data)[:8])) if isinstance(data, dict) else type(data).__name__
        raise CorpusError(
            f"expected a dictionary with trainVid and testVid, or with train, dev and test, got {keys or 'an empty one'}"
        )
    table = _Table(
        kind="train/dev/test dictionary",
        dataset="auto",
        train=[],
        dev=[],
        test=[],
        features={m: {} for m in _FULL},
        labels={},
        speakers={},
    )
    seen: set[str] = set()
    for split in ("train", "dev", "test"):
        records = data.get(split, [])
        if not isinstance(records, (list, tuple)):
            raise CorpusError(f"expected a list of conversations under {split!r}, got a {type(records).__name__}")
        for k, record in enumerate(records):
            if not isinstance(record, dict):
                raise CorpusError(
                    f"{split} conversation {k}: expected a dictionary or a Sample, got a {type(record).__name__}"
                )
            vid = record.get("vid", record.get("uid", f"{split}{k}"))
            if not isinstance(vid, (str, int, np.generic)):
                raise CorpusError(
                    f"{split} conversation {k}: expected a name or number as vid, got a {type(vid).__name__}"
                )
            base = vid = str(vid)
            again = 1
            while vid in seen:  # conversations cut into pieces keep one id
                again += 1
                vid = f"{base}#{again}"
            seen.add(vid)
            getattr(table, split).append(vid)
            for m, key in _FULL.items():
                # COGMEN trains on the sentence embeddings, whatever else a sample carries as text.
                value = record.get("sbert_sentence_embeddings", record.get("text")) if m == "t" else record.get(key)
                if value is not None:
                    table.features[m][vid] = value
            for target, keys in ((table.labels, ("labels", "label")), (table.speakers, ("speakers", "speaker"))):
                found = [record[key] for key in keys if key in record]
                if found:
                    target[vid] = found[0]
    wanted = modalities or [m for m in _FULL]
    for m in wanted:
        if not table.features[m]:
            raise CorpusError(f"modality {m!r} ({_FULL[m]}) is missing; leave it out of modalities to read the others")
    table.features = {m: table.features[m] for m in wanted}
    table.labels, table.speakers = table.labels or None, table.speakers or None
    if table.train and all(v.startswith("Ses") for v in table.train):
        table.dataset = "iemocap"
    elif table.train and all(v.startswith("diag_") for v in table.train):
        table.dataset = "mosei"
        table.speakers = None
    table.dev = table.dev or None
    return table


def _npz(path, dataset, num_classes, dev_split, seed, modalities, name) -> Corpus:
    try:
        with zipfile.ZipFile(path) as archive:
            size, packed = sum(i.file_size for i in archive.infolist()), os.path.getsize(path)
        if size > 1 << 30 and size > 200 * packed:
            raise CorpusError(f"its {packed} bytes unpack to {size}: refused")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except OSError as error:
        raise CorpusError(f"cannot be read: {error.strerror or error}") from None
    except CorpusError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds for damaged archives
        raise CorpusError(f"not a readable .npz archive of plain arrays ({error})") from None
    for key in ("conversation_offsets", "conversation_id"):
        if key not in arrays:
            raise CorpusError(f"array {key!r} is missing; found {', '.join(arrays) or 'none'}")
    wanted = modalities or [m for m in _FULL if _FULL[m] in arrays]
    for m in wanted:
        if _FULL[m] not in arrays:
            raise CorpusError(f"modality {m!r} ({_FULL[m]}) is missing; found {', '.join(arrays)}")
    labels = arrays.get("label")
    if labels is not None and "label_names" not in arrays:
        raise CorpusError("array 'label_names' is missing, though there are labels")
    classes = [str(c) for c in arrays.get("label_names", [])]
    if num_classes is not None and num_classes != len(classes):
        raise CorpusError(f"num_classes: expected {len(classes)}, which the file's labels have, got {num_classes}")
    ids = arrays["conversation_id"]
    stem = os.path.splitext(os.path.basename(path))[0]
    corpus = Corpus(
        name=name or (stem if dataset == "auto" else dataset),
        features={m: arrays[_FULL[m]] for m in wanted},
        offsets=arrays["conversation_offsets"],
        labels=labels,
        speakers=arrays.get("speaker"),
        conversation_ids=ids,
        split=arrays.get("split", [""] * len(ids)),
        class_names=classes,
        utterance_ids=arrays.get("utterance_id"),
        source=f"npz {os.path.basename(path)}",
    )
    if dev_split == "auto":
        dev_split = (
            "official" if len(corpus.conversations("dev")) or not len(corpus.conversations("train")) else "random_tenth"
        )
        if dev_split == "official":
            return corpus
    return corpus.with_split(dev_split, seed)


# -- packing -----------------------------------------------------------------------------------------------------------


def _assemble(table: _Table, num_classes, dev_split, seed, labels_are, neutral, name) -> Corpus:
    train, dev, note = _split(table, dev_split, seed)
    order = train + dev + table.test
    if not order:
        raise CorpusError("expected at least one conversation, got none")
    if not train and not table.test:
        raise CorpusError("expected training or test conversations, got none")

    blocks: dict[str, list[np.ndarray]] = {m: [] for m in table.features}
    widths: dict[str, int] = {}
    lengths, labels, speakers, utterances = [], [], [], []
    for vid in order:
        where = f"conversation {str(vid)!r}"
        for m, values in table.features.items():
            if vid not in values:
                raise CorpusError(f"{where}: modality {m!r} ({_FULL[m]}) is missing")
            rows = _rows(values[vid], f"{where}, {_FULL[m]}", table.frames)
            if len(rows) and rows.shape[1] != widths.setdefault(m, rows.shape[1]):
                raise CorpusError(
                    f"{where}: modality {m!r} has width {rows.shape[1]}, the conversations before have {widths[m]}"
                )
            if blocks[m] is not next(iter(blocks.values())) and len(rows) != lengths[-1]:
                raise CorpusError(
                    f"{where}: {len(rows)} utterances in modality {m!r}, {lengths[-1]} in {next(iter(blocks))!r}"
                )
            if blocks[m] is next(iter(blocks.values())):
                if not len(rows):
                    raise CorpusError(f"{where} is empty")
                lengths.append(len(rows))
            blocks[m].append(rows)
        n = lengths[-1]
        if table.labels is not None:
            labels.append(_numbers(_of(table.labels, vid, where, "labels"), n, where, "label"))
        if table.speakers is not None:
            speakers.append(_speakers(_of(table.speakers, vid, where, "speakers"), n, where))
        ids = (table.utterance_ids or {}).get(vid)
        named = (
            isinstance(ids, (list, tuple, np.ndarray))
            and len(ids) == n
            and all(isinstance(u, (str, int, np.generic)) for u in ids)
        )
        utterances.append([str(u) for u in ids] if named else None)

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    numbers, who, names = None, None, []
    if table.speakers is not None:
        who, names = _number_speakers(speakers)
    kept, classes = None, []
    if table.labels is not None:
        numbers, classes, kept = _classes(
            table, np.concatenate(labels), num_classes, labels_are, neutral, lambda row: _place(order, offsets, row)
        )
    elif table.dataset in CLASS_COUNTS:
        classes = CLASS_NAMES[f"{table.dataset}{num_classes or CLASS_COUNTS[table.dataset][0]}"]
    four = table.dataset == "iemocap" and num_classes == 4 and len(classes) == 6
    corpus = Corpus(
        name=name or table.dataset,
        features={m: np.concatenate(x) for m, x in blocks.items()},
        offsets=offsets,
        labels=numbers,
        speakers=who,
        speaker_names=names,
        conversation_ids=order,
        split=["train"] * len(train) + ["dev"] * len(dev) + ["test"] * len(table.test),
        class_names=classes,
        utterance_ids=None if None in utterances else [u for ids in utterances for u in ids],
        source="; ".join([table.kind, *table.notes, note]),
    )
    if four:
        corpus = corpus.relabel([0, 1, 2, 3, -1, -1], CLASS_NAMES["iemocap4"], "utterances of exc and fru dropped")
    if kept is not None:
        corpus = corpus.select(keep=kept)
        corpus.source += "; neutral utterances dropped"
    return corpus


def _split(table: _Table, dev_split, seed) -> tuple[list, list, str]:
    pool = table.train + (table.dev or [])
    if dev_split == "auto":
        dev_split = "official" if table.dev or table.dataset == "meld" else "random_tenth"
    if dev_split != "official":
        train, dev = tenth(pool, dev_split, seed)
        return train, dev, split_note(dev_split, seed, len(dev))
    if table.dev:
        return table.train, table.dev, f"dev split of the source ({len(table.dev)} conversations)"
    if table.dataset == "meld":
        dev = [v for v in pool if _whole(v) in MELD_DEV_IDS]
        if len(dev) != len(MELD_DEV_IDS):
            raise CorpusError(
                f"dev_split: expected MELD's 114 official development dialogues, ids 1039 to 1152, among the training ids, "
                f"found {len(dev)}; choose first_tenth or random_tenth"
            )
        chosen = set(dev)
        return [v for v in pool if v not in chosen], dev, "dev split official (MELD dialogues 1039 to 1152)"
    raise CorpusError(
        f"dev_split: {table.dataset} has no official development split; choose random_tenth, first_tenth or none"
    )


def _classes(table: _Table, values: np.ndarray, num_classes, labels_are, neutral, place):
    """(labels int64 [N], class names, rows to keep or None) from the source's numbers, float64 [N]."""
    finite = np.isfinite(values)
    if not finite.all():
        raise CorpusError(f"{place(int(np.argmin(finite)))}: label {values[np.argmin(finite)]}, expected a number")
    whole = values == np.floor(values)
    sentiment = table.dataset in ("mosei", "mosi")
    scored = sentiment and (labels_are == "score" or (labels_are == "auto" and not (whole.all() and values.min() >= 0)))
    if labels_are == "score" and not sentiment:
        raise CorpusError(f"labels: expected class for {table.dataset}, got score")
    if neutral == "drop" and not (sentiment and num_classes == 2):
        raise CorpusError("neutral: 'drop' needs sentiment in two classes (dataset mosei or mosi, num_classes 2)")
    if scored:
        bad = np.abs(values) > 3
        if bad.any():
            raise CorpusError(
                f"{place(int(np.argmax(bad)))}: sentiment score {values[np.argmax(bad)]:g} is out of range -3 to 3"
            )
        count = num_classes or CLASS_COUNTS[table.dataset][0]
        return (
            bin_scores(values, count),
            CLASS_NAMES[f"{table.dataset}{count}"],
            values != 0 if neutral == "drop" else None,
        )
    if not whole.all():
        raise CorpusError(
            f"{place(int(np.argmin(whole)))}: label {values[np.argmin(whole)]:g}, expected a whole number"
        )
    if np.abs(values).max() >= 2**31:
        raise CorpusError(
            f"{place(int(np.argmax(np.abs(values))))}: label {values[np.argmax(np.abs(values))]:g} is out of range"
        )
    labels = values.astype(np.int64)
    highest = int(labels.max())
    if table.dataset == "other":
        count = highest + 1 if num_classes is None else num_classes
        if not 1 <= count <= 10_000:
            raise CorpusError(f"num_classes: expected 1 to 10000 classes, got {count}")
        return labels, [str(c) for c in range(count)], None
    if table.dataset == "iemocap":
        count = 4 if highest < 4 else 6
        if num_classes == 6:
            count = 6
    elif sentiment:
        count = 2 if highest < 2 and num_classes != 7 else 7
        if num_classes == 2 and count == 7:  # the seven bins fall wholly on one side of 0, or on it
            _in_range(labels, 7, place)
            return (
                (labels >= 3).astype(np.int64),
                CLASS_NAMES[f"{table.dataset}2"],
                labels != 3 if neutral == "drop" else None,
            )
        if neutral == "drop":
            raise CorpusError(
                "neutral: the source's labels are in two classes already, neutral utterances cannot be told"
            )
    else:
        count = CLASS_COUNTS[table.dataset][0]
    _in_range(labels, count, place)
    return labels, CLASS_NAMES[f"{table.dataset}{count}"], None


def _in_range(labels, count, place):
    bad = (labels < 0) | (labels >= count)
    if bad.any():
        row = int(np.argmax(bad))
        raise CorpusError(f"{place(row)}: label {labels[row]} is out of range 0 to {count - 1}")


def _rows(value, where, frames) -> np.ndarray:
    """One conversation of one modality, as an array [n, d] or a sequence of n vectors, to float32 [n, d]."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        if value.ndim == 2 and value.dtype.kind in "fiub":
            return _float32(value)
        if value.size == 0:
            return np.empty((0, 0), np.float32)
        if value.ndim != 3 or value.dtype.kind not in "fiub":
            raise CorpusError(f"{where}: expected numbers [utterances, width], got {value.dtype} {value.shape}")
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise CorpusError(f"{where}: expected an array or a list of vectors, got a {type(value).__name__}")
    vectors = []
    for u, vector in enumerate(value):
        at = f"{where}, utterance {u}"
        if isinstance(vector, (list, tuple)):
            vector = _from_list(vector, at, frames)
        if not isinstance(vector, np.ndarray) or vector.dtype.kind not in "fiub":
            got = f"an array of {vector.dtype}" if isinstance(vector, np.ndarray) else f"a {type(vector).__name__}"
            raise CorpusError(f"{at}: expected a vector of numbers, got {got}")
        if vector.ndim == 2 and vector.shape[0] == 1:
            vector = vector[0]
        elif vector.ndim == 2 and frames and len(vector):
            vector = vector.mean(axis=0, dtype=np.float64)
        if vector.ndim != 1:
            raise CorpusError(f"{at}: expected a vector, got shape {vector.shape}")
        if vectors and len(vector) != len(vectors[0]):
            raise CorpusError(f"{at}: width {len(vector)}, the utterances before have {len(vectors[0])}")
        vectors.append(vector)
    return _float32(np.stack(vectors)) if vectors else np.empty((0, 0), np.float32)


def _from_list(vector, at, frames) -> np.ndarray:
    # Nested lists are not handed to numpy: a few bytes of pickle can nest one list in itself to any size.
    if (
        frames
        and vector
        and all(isinstance(f, np.ndarray) and f.ndim == 1 and f.shape == vector[0].shape for f in vector)
    ):
        return np.stack(vector)
    for x in vector:
        if not isinstance(x, (int, float, np.number)):
            raise CorpusError(f"{at}: expected a vector of numbers, got a list holding a {type(x).__name__}")
    try:
        return np.array(vector, dtype=np.float64)
    except OverflowError:
        raise CorpusError(f"{at}: a number too large for a feature") from None


def _float32(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # Inf is reported with its place when the corpus is checked
        return np.asarray(x, dtype=np.float32)


def _numbers(value, n, where, what) -> np.ndarray:
    """n labels, each a number or a vector of one, to float64 [n]."""
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise CorpusError(f"{where}: expected a list of {what}s, got a {type(value).__name__}")
    if len(value) != n:
        raise CorpusError(f"{where}: {len(value)} {what}s for {n} utterances")
    result = np.empty(n)
    for u, x in enumerate(value):
        if isinstance(x, (list, tuple)) or (isinstance(x, np.ndarray) and x.ndim == 1):
            x = x[0] if len(x) else None  # MOSEI's sentiment stands before its emotions
        if not isinstance(x, (int, float, np.integer, np.floating)):
            raise CorpusError(f"{where}, utterance {u}: expected a number as {what}, got a {type(x).__name__}")
        try:
            result[u] = float(x)
        except OverflowError:
            raise CorpusError(f"{where}, utterance {u}: {what} is out of range") from None
    return result


def _speakers(value, n, where) -> list:
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise CorpusError(f"{where}: expected a list of speakers, got a {type(value).__name__}")
    if len(value) != n:
        raise CorpusError(f"{where}: {len(value)} speakers for {n} utterances")
    result = []
    for u, x in enumerate(value):
        if isinstance(x, (list, tuple, np.ndarray)):  # one-hot
            if len(x) == 0 or not all(isinstance(y, (int, float, np.number)) for y in x):
                raise CorpusError(f"{where}, utterance {u}: expected a one-hot speaker, got {type(x).__name__}")
            x = int(np.argmax(np.asarray(x, dtype=np.float64)))
        if isinstance(x, (np.integer, np.floating, float)):
            x = int(x) if abs(x) < 2**31 else -1
        if not isinstance(x, (str, int)):
            raise CorpusError(f"{where}, utterance {u}: expected a speaker's name or number, got a {type(x).__name__}")
        result.append(str(x) if isinstance(x, str) else int(x))
    return result


def _number_speakers(speakers: list[list]) -> tuple[np.ndarray, list[str]]:
    flat = [s for conversation in speakers for s in conversation]
    if all(isinstance(s, int) for s in flat):
        if any(abs(s) >= 2**31 for s in flat):
            raise CorpusError("speakers: expected numbers below 2**31")
        return np.array(flat, np.int64), []
    found = {str(s) for s in flat}
    names = ["M", "F"] if found <= {"M", "F"} else sorted(found)
    index = {s: i for i, s in enumerate(names)}
    return np.array([index[str(s)] for s in flat], np.int64), names


def _roberta(layers: list[dict], order: list, text_layer) -> dict:
    """Four dictionaries of vectors per utterance to one."""
    if text_layer in (1, 2, 3, 4):
        return layers[text_layer - 1]
    result = {}
    for vid in dict.fromkeys(order):
        where = f"conversation {str(vid)!r}"
        rows = [
            _rows(_of(layer, vid, where, f"RoBERTa layer {k + 1}"), f"{where}, RoBERTa layer {k + 1}", False)
            for k, layer in enumerate(layers)
        ]
        if len({x.shape for x in rows}) != 1:
            raise CorpusError(
                f"{where}: the four RoBERTa layers have shapes {', '.join(str(x.shape) for x in rows)}, expected one"
            )
        result[vid] = np.concatenate(rows, axis=1) if text_layer == "concat" else np.mean(rows, axis=0)
    return result


# -- small things ------------------------------------------------------------------------------------------------------


def _ids(data, key) -> list:
    what = key if isinstance(key, str) else f"element {key}"
    if isinstance(data, dict) and key not in data:
        raise CorpusError(f"key {what!r} is missing; found {', '.join(map(str, list(data)[:12]))}")
    value = data[key]
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)  # the order of a set is not the file's
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, (str, int, float, np.generic)) for v in value):
        raise CorpusError(f"{what}: expected a list of conversation ids, got a {type(value).__name__}")
    return [v.item() if isinstance(v, np.generic) else v for v in value]


def _mapping(data: dict, key: str) -> dict:
    if key not in data:
        hint = f"; found {', '.join(map(str, list(data)[:12]))}" if data else ""
        short = {v: k for k, v in _FULL.items()}.get(key)
        what = f"modality {short!r} (key {key!r})" if short else f"key {key!r}"
        raise CorpusError(f"{what} is missing{hint}")
    if not isinstance(data[key], dict):
        raise CorpusError(f"{key}: expected a dictionary by conversation, got a {type(data[key]).__name__}")
    return data[key]


def _of(values, vid, where, what):
    if vid not in values:
        raise CorpusError(f"{where}: {what} missing")
    return values[vid]


def _is_vectors(values: dict) -> bool:
    """Whether a dictionary holds wide vectors per utterance (features), rather than labels."""
    first = next(iter(values.values()), None)
    if not isinstance(first, (list, tuple, np.ndarray)) or not len(first):
        return False
    vector = first[0]  # no numpy conversion: see _from_list
    return (
        isinstance(vector, (list, tuple, np.ndarray))
        and len(vector) > 7
        and isinstance(vector[0], (int, float, np.number))
    )


def _whole(value) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return -1


def _place(order, offsets, row: int) -> str:
    c = int(np.searchsorted(offsets, row, side="right")) - 1
    return f"conversation {str(order[c])!r}, utterance {row - offsets[c]}"


def _choice(what: str, value: Any, allowed: Sequence) -> None:
    if value not in allowed or isinstance(value, bool):
        raise CorpusError(f"{what}: expected one of {', '.join(map(str, allowed))}, got {value!r}")


def _head(path: str, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from None


def _at(path: str, function, *arguments):
    """Calls, and puts the file's name in front of what went wrong."""
    try:
        return function(*arguments)
    except CorpusError as error:
        text = str(error)
        # Options keep their own name in front.
        option = text.split(":", 1)[0] in (
            "dev_split",
            "num_classes",
            "emotion",
            "neutral",
            "labels",
            "modalities",
            "text_file",
        )
        raise CorpusError(text if option or text.startswith(path) else f"{path}: {text}") from None
    except (RecursionError, MemoryError) as error:
        raise CorpusError(f"{path}: its contents cannot be unpacked ({type(error).__name__})") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # A strange file can put any value anywhere; the usual mistakes were named above.
        raise CorpusError(
            f"{path}: its contents are not laid out as expected ({type(error).__name__}: {error})"
        ) from error


def _call(function, what: str, options: dict, *arguments) -> Corpus:
    import inspect

    known = list(inspect.signature(function).parameters)
    for option in options:
        if option not in known:
            raise CorpusError(f"{option}: no such option for {what}; expected one of {', '.join(known)}")
    return function(*arguments, **options)
