"""The corpus in memory and on disk (docs/corpus.md describes the file byte by byte)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from .errors import CorpusError, written_whole

if TYPE_CHECKING:
    from ..batch import DialogueBatch

MODALITIES = ("t", "a", "v")
SPLITS = ("train", "dev", "test")

MAGIC = b"\x89ADA2I\r\n"  # not ASCII, and with a line end: a transfer in text mode shows at once
SCHEMA = 1
PROLOGUE = 64
ALIGN = 64
_CHECKED = 32  # bytes of the prologue under the checksum; the checksum itself follows
_NO_SPLIT = 255
_MAX_HEADER = 1 << 26
_CHUNK = 1 << 22
_DTYPES = ("<f4", "<i8", "|u1")


@dataclass
class Corpus:
    """C conversations of N utterances in all, packed: conversation c owns rows ``offsets[c] : offsets[c + 1]``.

    name: of the data set.
    features: float32 [N, d_m] by modality, a non-empty subset of ``"t"`` (text), ``"a"`` (audio), ``"v"`` (visual).
    offsets: int64 [C + 1]; starts at 0, ends at N, strictly increasing (no empty conversation).
    labels: int64 [N], indices into ``class_names``; None for data to predict on.
    speakers: int64 [N], >= 0, or None; indices into ``speaker_names`` where that is not empty.
    conversation_ids: C distinct strings (kept as an object array, as are the other strings per row).
    utterance_ids: N strings, or None.
    split: C of ``"train"``, ``"dev"``, ``"test"`` or ``""`` (no split).
    class_names: C classes, in label order.
    source: which reader made it, and how the split was made.

    Construction converts what can be converted without loss of meaning and then calls `validate`, unless ``checked`` is True
    (for callers that do so themselves).
    Raises `CorpusError`.
    """

    name: str
    features: dict[str, np.ndarray]
    offsets: np.ndarray
    labels: np.ndarray | None
    speakers: np.ndarray | None
    conversation_ids: Sequence[str]
    split: Sequence[str]
    class_names: list[str]
    source: str = ""
    utterance_ids: Sequence[str] | None = None
    speaker_names: list[str] = field(default_factory=list)
    checked: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self):
        if not isinstance(self.features, dict) or not self.features:
            raise CorpusError(
                f"{self.name}: features: expected a non-empty dictionary of modalities, got {self.features!r:.60}"
            )
        unknown = [m for m in self.features if m not in MODALITIES]
        if unknown:
            raise CorpusError(f"{self.name}: features: expected modalities among t, a, v, got {unknown[0]!r}")
        self.features = {
            m: _array(self.features[m], np.float32, 2, f"{self.name}: features[{m!r}]")
            for m in MODALITIES
            if m in self.features
        }
        self.offsets = _array(self.offsets, np.int64, 1, f"{self.name}: offsets")
        if self.labels is not None:
            self.labels = _array(self.labels, np.int64, 1, f"{self.name}: labels")
        if self.speakers is not None:
            self.speakers = _array(self.speakers, np.int64, 1, f"{self.name}: speakers")
        self.conversation_ids = _strings(self.conversation_ids)
        self.split = _strings(["" if s is None else s for s in self.split])
        self.class_names = [str(name) for name in self.class_names]
        self.speaker_names = [str(name) for name in self.speaker_names]
        if self.utterance_ids is not None:
            self.utterance_ids = _strings(self.utterance_ids)
        if not self.checked:
            self.validate()
        self.checked = False  # copies made from this one are checked again

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def num_conversations(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_utterances(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.features)

    @property
    def widths(self) -> dict[str, int]:
        """Features per utterance, by modality."""
        return {m: x.shape[1] for m, x in self.features.items()}

    @property
    def lengths(self) -> np.ndarray:
        """Utterances per conversation, int64 [C]."""
        return np.diff(self.offsets)

    # -- checks --------------------------------------------------------------------------------------------------------

    def _where(self, row: int) -> str:
        c = int(np.searchsorted(self.offsets, row, side="right")) - 1
        u = row - int(self.offsets[c])
        known = f" ({self.utterance_ids[row]})" if self.utterance_ids is not None else ""
        return f"{self.name}: conversation {self.conversation_ids[c]!r}, utterance {u}{known}"

    def validate(self, values: bool = True) -> Corpus:
        """Checks everything the class promises; ``values=False`` leaves out the pass over the features for NaN and Inf.

        Returns itself. Raises `CorpusError` naming conversation and utterance (counted from 0 within the conversation).
        """
        name, offsets = self.name, self.offsets
        if len(offsets) < 2:
            raise CorpusError(f"{name}: offsets: expected at least one conversation, got none")
        if offsets[0] != 0:
            raise CorpusError(f"{name}: offsets: expected the first to be 0, got {offsets[0]}")
        count = self.num_conversations
        for what, got in (("conversation_ids", len(self.conversation_ids)), ("split", len(self.split))):
            if got != count:
                raise CorpusError(f"{name}: {what}: expected {count}, one per conversation, got {got}")
        lengths = self.lengths
        if lengths.min() < 1:
            c = int(np.argmax(lengths < 1))
            problem = "is empty" if lengths[c] == 0 else f"has {lengths[c]} utterances; offsets must increase"
            raise CorpusError(f"{name}: conversation {self.conversation_ids[c]!r} {problem}")
        rows = self.num_utterances
        packed = {f"features[{m!r}]": x for m, x in self.features.items()}
        packed.update(labels=self.labels, speakers=self.speakers, utterance_ids=self.utterance_ids)
        for what, array in packed.items():
            if array is not None and len(array) != rows:
                raise CorpusError(
                    f"{name}: {what}: expected {rows} rows, the sum of the conversation lengths, got {len(array)}"
                )
        for m, x in self.features.items():
            if x.shape[1] < 1:
                raise CorpusError(f"{name}: features[{m!r}]: expected at least one feature per utterance, got width 0")
        ids, counts = np.unique(self.conversation_ids, return_counts=True)
        if len(ids) != count:
            raise CorpusError(
                f"{name}: conversation_ids: expected distinct ids, {ids[counts > 1][0]!r} occurs {counts.max()} times"
            )
        for c, split in enumerate(self.split):
            if split and split not in SPLITS:
                raise CorpusError(
                    f"{name}: conversation {self.conversation_ids[c]!r}: expected split train, dev or test, got {split!r}"
                )
        if len(set(self.class_names)) != len(self.class_names):
            raise CorpusError(f"{name}: class_names: expected distinct names, got {', '.join(self.class_names)}")
        if self.labels is not None:
            bad = (self.labels < 0) | (self.labels >= self.num_classes)
            if bad.any():
                row = int(np.argmax(bad))
                raise CorpusError(
                    f"{self._where(row)}: label {self.labels[row]} is out of range 0 to {self.num_classes - 1}"
                )
        if self.speakers is not None:
            bad = self.speakers < 0
            if self.speaker_names:
                bad |= self.speakers >= len(self.speaker_names)
            if bad.any():
                row = int(np.argmax(bad))
                limit = f"0 to {len(self.speaker_names) - 1}" if self.speaker_names else "0 and up"
                raise CorpusError(f"{self._where(row)}: speaker {self.speakers[row]} is out of range {limit}")
        if values:
            for m, x in self.features.items():
                step = max(1, _CHUNK // x.shape[1])  # by pieces: the mask of a mapped corpus must not fill the memory
                for start in range(0, rows, step):
                    finite = np.isfinite(x[start : start + step])
                    if not finite.all():
                        r, d = (int(i) for i in np.argwhere(~finite)[0])
                        raise CorpusError(
                            f"{self._where(start + r)}: feature {d} of modality {m!r} is {x[start + r, d]}, expected a finite number"
                        )
        return self

    # -- choosing ------------------------------------------------------------------------------------------------------

    def conversations(self, split: str | None = None) -> np.ndarray:
        """Indices of the conversations of a split, int64, in corpus order; all of them without a split."""
        if split is None:
            return np.arange(self.num_conversations)
        if split not in (*SPLITS, ""):
            raise CorpusError(f"split: expected train, dev or test, got {split!r}")
        return np.flatnonzero(np.array([s == split for s in self.split], dtype=bool))

    def rows(self, conversation_indices) -> np.ndarray | slice:
        """The utterance rows of some conversations, in the order given: a slice where they lie side by side."""
        index = np.asarray(conversation_indices, dtype=np.int64).reshape(-1)
        if len(index) and (index.min() < 0 or index.max() >= self.num_conversations):
            raise CorpusError(
                f"{self.name}: expected conversation indices 0 to {self.num_conversations - 1}, got {index.min()} to {index.max()}"
            )
        if len(index) == 0:
            return slice(0, 0)
        starts, stops = self.offsets[index], self.offsets[index + 1]
        if (starts[1:] == stops[:-1]).all():
            return slice(int(starts[0]), int(stops[-1]))
        lengths = stops - starts
        first = np.cumsum(lengths) - lengths
        return np.repeat(starts - first, lengths) + np.arange(int(lengths.sum()))

    def batch(self, conversation_indices, modalities: Sequence[str] | None = None) -> DialogueBatch:
        """Some conversations as a batch on the CPU: features [n, d_m] float32, offsets int64 [B + 1], labels int64 [n] or None.

        Conversations side by side in the corpus are handed out without a copy: such a batch shares the corpus's memory.
        """
        import torch

        from ..batch import DialogueBatch

        chosen = self._modalities(modalities)
        index = np.asarray(conversation_indices, dtype=np.int64).reshape(-1)
        rows = self.rows(index)
        lengths = self.lengths[index]
        offsets = np.zeros(len(index) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return DialogueBatch(
            features={m: torch.from_numpy(_writable(self.features[m][rows])) for m in chosen},
            offsets=torch.from_numpy(offsets),
            labels=None if self.labels is None else torch.from_numpy(_writable(self.labels[rows])),
        )

    def _modalities(self, modalities) -> tuple[str, ...]:
        if modalities is None:
            return self.modalities
        chosen = tuple(modalities)
        for m in chosen:
            if m not in self.features:
                raise CorpusError(f"modalities: {self.name} has {', '.join(self.modalities)}, not {m!r}")
        if not chosen or len(set(chosen)) != len(chosen):
            raise CorpusError(
                f"modalities: expected distinct names among {', '.join(self.modalities)}, got {modalities!r}"
            )
        return chosen

    # -- other corpora from this one -----------------------------------------------------------------------------------

    def select(self, conversation_indices=None, keep: np.ndarray | None = None) -> Corpus:
        """A copy with these conversations in this order, and of them only the utterances where ``keep`` (bool [N]) holds.

        Conversations left without an utterance are dropped.
        """
        index = (
            self.conversations()
            if conversation_indices is None
            else np.asarray(conversation_indices, dtype=np.int64).reshape(-1)
        )
        rows = self.rows(index)
        rows = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        owner = np.repeat(np.arange(len(index)), self.lengths[index])
        if keep is not None:
            mask = np.asarray(keep, dtype=bool)[rows]
            rows, owner = rows[mask], owner[mask]
        lengths = np.bincount(owner, minlength=len(index))
        index, lengths = index[lengths > 0], lengths[lengths > 0]
        return replace(
            self,
            features={m: x[rows] for m, x in self.features.items()},
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            labels=None if self.labels is None else self.labels[rows],
            speakers=None if self.speakers is None else self.speakers[rows],
            utterance_ids=None if self.utterance_ids is None else self.utterance_ids[rows],
            conversation_ids=self.conversation_ids[index],
            split=self.split[index],
        )

    def relabel(self, mapping: Sequence[int], class_names: Sequence[str], note: str = "") -> Corpus:
        """Old label k becomes ``mapping[k]``; utterances whose new label is -1 are dropped, and conversations they leave empty."""
        if self.labels is None:
            raise CorpusError(f"{self.name}: relabel: expected a corpus with labels, got none")
        if len(mapping) != self.num_classes:
            raise CorpusError(
                f"{self.name}: relabel: expected {self.num_classes} entries, one per class, got {len(mapping)}"
            )
        labels = np.asarray(mapping, dtype=np.int64)[self.labels]
        if (labels < 0).all():
            raise CorpusError(f"{self.name}: relabel: no utterance is left")
        # Dropped rows first get a label that is in range: the copy is checked before it is cut.
        changed = replace(
            self, labels=np.maximum(labels, 0), class_names=list(class_names), source=_note(self.source, note)
        )
        return changed.select(keep=labels >= 0) if (labels < 0).any() else changed

    def with_split(self, dev_split: str = "random_tenth", seed: int = 12) -> Corpus:
        """A copy with another development split, cut from the conversations that are now ``train`` or ``dev``.

        ``"random_tenth"``: their indices are shuffled by ``random.Random(seed)``; the first ``int(0.1 n)`` are dev.
        ``"first_tenth"``: the first ``int(0.1 n)`` in corpus order are dev. At least one, where there are two or more.
        ``"official"``: unchanged; `CorpusError` if there is no dev conversation. ``"none"``: all of them train.
        """
        if dev_split == "official":
            if not len(self.conversations("dev")):
                raise CorpusError(
                    f"dev_split: {self.name} has no official development split; choose random_tenth, first_tenth or none"
                )
            return self
        pool = [c for c, s in enumerate(self.split) if s in ("train", "dev")]
        train, dev = tenth(pool, dev_split, seed)
        split = np.array(self.split, dtype="U5")
        split[train], split[dev] = "train", "dev"
        return replace(self, split=split, source=_note(self.source, split_note(dev_split, seed, len(dev))))

    # -- words ---------------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """A table: per split its conversations, utterances, longest conversation and utterances per class; then widths and source."""
        names = [s for s in SPLITS if len(self.conversations(s))] + ([""] if len(self.conversations("")) else [])
        head = ["split", "conversations", "utterances", "longest"] + (
            self.class_names if self.labels is not None else []
        )
        table = [head]
        for s in names:
            index = self.conversations(s)
            rows = self.rows(index)
            row = [s or "(none)", len(index), int(self.lengths[index].sum()), int(self.lengths[index].max())]
            if self.labels is not None:
                row += np.bincount(self.labels[rows], minlength=self.num_classes).tolist()
            table.append([str(x) for x in row])
        columns = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [
            "  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, columns)))
            for row in table
        ]
        widths = ", ".join(f"{m} {d}" for m, d in self.widths.items())
        speakers = "" if self.speakers is None else f"\nspeakers: {len(np.unique(self.speakers))}"
        return (
            "\n".join([self.name, *lines, f"widths: {widths}"])
            + speakers
            + (f"\nsource: {self.source}" if self.source else "")
        )

    # -- the file ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Writes the corpus file. A file of that name is replaced in one step at the end, or not at all.

        Raises `CorpusError` where the file cannot be written or the corpus is not valid.
        """
        self.validate()
        path = os.fspath(path)
        arrays = {f"features.{m}": x for m, x in self.features.items()}
        arrays["offsets"] = self.offsets
        if self.labels is not None:
            arrays["labels"] = self.labels
        if self.speakers is not None:
            arrays["speakers"] = self.speakers
        codes = {**{s: i for i, s in enumerate(SPLITS)}, "": _NO_SPLIT}
        arrays["split"] = np.array([codes[s] for s in self.split], np.uint8)
        for what, strings in (("conversation_ids", self.conversation_ids), ("utterance_ids", self.utterance_ids)):
            if strings is not None:
                arrays[f"{what}.bytes"], arrays[f"{what}.offsets"] = _pack(strings)
        arrays = {k: np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("<")) for k, x in arrays.items()}
        header, size = _header(self, arrays)

        with written_whole(path, CorpusError) as file:
            prologue = (
                MAGIC
                + SCHEMA.to_bytes(4, "little")
                + len(header).to_bytes(4, "little")
                + size.to_bytes(8, "little")
                + bytes(8)
            )
            digest = hashlib.blake2b(prologue, digest_size=32)
            file.write(prologue + bytes(32))
            for part in _parts(header, arrays.values()):
                digest.update(part)
                file.write(part)
            file.seek(_CHECKED)
            file.write(digest.digest())

    @classmethod
    def load(cls, path: str | os.PathLike, mmap: bool = True, verify: bool = True) -> Corpus:
        """Reads a corpus file.

        mmap: map the arrays instead of reading them. The mapping is copy-on-write: writing to an array never reaches the file.
        verify: check the checksum and every feature (one pass over the file); without it only structure, labels and ids.

        Raises `CorpusError` for foreign, truncated, damaged and newer files, and for corpora that are not valid.
        """
        path = os.fspath(path)
        try:
            with open(path, "rb") as file:
                actual = os.fstat(file.fileno()).st_size
                prologue = file.read(PROLOGUE)
                if prologue[:8] != MAGIC:
                    raise CorpusError(f"{path} is not an ada2i corpus: it starts with {prologue[:8]!r}, not {MAGIC!r}")
                if len(prologue) < PROLOGUE:
                    raise CorpusError(f"{path} is truncated: {actual} bytes, expected at least {PROLOGUE}")
                version = int.from_bytes(prologue[8:12], "little")
                if version != SCHEMA:
                    raise CorpusError(f"{path} has schema version {version}, this package reads version {SCHEMA}")
                size = int.from_bytes(prologue[16:24], "little")
                if actual != size:
                    problem = "truncated" if actual < size else "not whole: it goes on after its end"
                    raise CorpusError(f"{path} is {problem}: {actual} bytes, expected {size}")
                header_size = int.from_bytes(prologue[12:16], "little")
                if header_size > min(_MAX_HEADER, size - PROLOGUE):
                    raise CorpusError(f"{path} is damaged: its header claims {header_size} bytes")
                raw = file.read(header_size)
                if verify:
                    digest = hashlib.blake2b(prologue[:_CHECKED], digest_size=32)
                    digest.update(raw)
                    while part := file.read(_CHUNK):
                        digest.update(part)
                    if digest.digest() != prologue[_CHECKED:]:
                        raise CorpusError(f"{path} is damaged: its checksum does not match its contents")
            data = np.memmap(path, np.uint8, mode="c") if mmap else np.fromfile(path, np.uint8)
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from None
        try:
            header = json.loads(raw)
            arrays = _arrays(path, header, data.view(np.ndarray))
            return _build(cls, header, arrays).validate(values=verify)
        except CorpusError as error:
            text = str(error)
            raise CorpusError(text if text.startswith(path) else f"{path}: {text}") from None
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise CorpusError(
                f"{path} is damaged: its header cannot be understood ({type(error).__name__}: {error})"
            ) from None


def tenth(pool: Sequence, dev_split: str, seed: int) -> tuple[list, list]:
    """Cuts a pool of training conversations into (train, dev) as `Corpus.with_split` says, each in the order the cut leaves."""
    pool = list(pool)
    if dev_split == "none":
        return pool, []
    if dev_split == "random_tenth":
        random.Random(seed).shuffle(pool)
    elif dev_split != "first_tenth":
        raise CorpusError(f"dev_split: expected official, random_tenth, first_tenth or none, got {dev_split!r}")
    size = max(int(len(pool) * 0.1), 1 if len(pool) > 1 else 0)
    return pool[size:], pool[:size]


def split_note(dev_split: str, seed: int, size: int) -> str:
    seeded = f", seed {seed}" if dev_split == "random_tenth" else ""
    return f"dev split {dev_split}{seeded} ({size} conversations)"


def _note(source: str, note: str) -> str:
    return "; ".join(part for part in (source, note) if part)


def _array(value, dtype, ndim: int, what: str) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != ndim:
        raise CorpusError(f"{what}: expected {ndim} dimension{'s' * (ndim > 1)}, got shape {array.shape}")
    kinds = "fiub" if dtype == np.float32 else "iu"
    if array.dtype.kind not in kinds:
        raise CorpusError(f"{what}: expected {np.dtype(dtype).name}, got {array.dtype}")
    with np.errstate(over="ignore"):  # what overflows float32 becomes Inf, and validate names it
        return np.ascontiguousarray(array, dtype=dtype)


def _strings(values) -> np.ndarray:
    # Objects, not numpy text: that would cut trailing zeros, and print as np.str_.
    return np.array([str(value) for value in values], dtype=object)


def _writable(array: np.ndarray) -> np.ndarray:
    # torch warns about memory that numpy will not write to.
    return array if array.flags.writeable else array.copy()


def _pack(strings) -> tuple[np.ndarray, np.ndarray]:
    encoded = [s.encode() for s in strings]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(s) for s in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def _unpack(data: np.ndarray, offsets: np.ndarray, what: str) -> list[str]:
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
        raise CorpusError(f"{what}: offsets and bytes do not add up")
    raw, ends = data.tobytes(), offsets.tolist()
    return [raw[a:b].decode() for a, b in zip(ends, ends[1:])]


def _round_up(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


def _header(corpus: Corpus, arrays: dict[str, np.ndarray]) -> tuple[bytes, int]:
    """The JSON header, padded with spaces to the alignment, and the size of the whole file."""
    meta = {
        "name": corpus.name,
        "source": corpus.source,
        "class_names": corpus.class_names,
        "speaker_names": corpus.speaker_names,
        "splits": {s: i for i, s in enumerate(SPLITS)} | {"": _NO_SPLIT},
    }
    size = 0
    while True:  # array offsets count from the start of the file, so the header's size depends on itself
        position, entries = PROLOGUE + size, []
        for name, x in arrays.items():
            entries.append(
                {"name": name, "dtype": x.dtype.str, "shape": list(x.shape), "offset": position, "nbytes": x.nbytes}
            )
            position = _round_up(position + x.nbytes)
        raw = json.dumps(meta | {"arrays": entries}, ensure_ascii=False, separators=(",", ":")).encode()
        if len(raw) <= size:
            return raw.ljust(size), position
        size = _round_up(len(raw))


def _parts(header: bytes, arrays):
    yield header
    for x in arrays:
        raw = x.reshape(-1).view(np.uint8)
        for start in range(0, len(raw), _CHUNK):
            yield raw[start : start + _CHUNK].data
        yield bytes(_round_up(x.nbytes) - x.nbytes)


def _arrays(path: str, header: dict, data: np.ndarray) -> dict[str, np.ndarray]:
    arrays = {}
    for entry in header["arrays"]:
        name, dtype, shape, offset = entry["name"], entry["dtype"], entry["shape"], entry["offset"]
        if dtype not in _DTYPES:
            raise CorpusError(f"{path} is damaged: array {name!r} has dtype {dtype!r}")
        if not all(type(n) is int and n >= 0 for n in (*shape, offset)) or len(shape) > 2:
            raise CorpusError(f"{path} is damaged: array {name!r} has shape {shape} at {offset}")
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes != entry["nbytes"] or offset % ALIGN or offset < PROLOGUE or offset + nbytes > len(data):
            raise CorpusError(f"{path} is damaged: array {name!r} of {nbytes} bytes does not fit at byte {offset}")
        if name in arrays:
            raise CorpusError(f"{path} is damaged: array {name!r} occurs twice")
        arrays[name] = data[offset : offset + nbytes].view(dtype).reshape(shape)
    return arrays


def _build(cls, header: dict, arrays: dict[str, np.ndarray]) -> Corpus:
    features = {name.split(".", 1)[1]: x for name, x in arrays.items() if name.startswith("features.")}
    names = {code: s for s, code in {**{s: i for i, s in enumerate(SPLITS)}, "": _NO_SPLIT}.items()}
    codes = arrays["split"].tolist()
    unknown = [code for code in codes if code not in names]
    if unknown:
        raise CorpusError(f"split: expected codes 0, 1, 2 or 255, got {unknown[0]}")

    def strings(what):
        return _unpack(arrays[f"{what}.bytes"], arrays[f"{what}.offsets"], what) if f"{what}.bytes" in arrays else None

    ids = strings("conversation_ids")
    if ids is None:
        raise CorpusError("conversation_ids are missing")
    for what in ("class_names", "speaker_names"):
        if not isinstance(header[what], list) or not all(isinstance(s, str) for s in header[what]):
            raise CorpusError(f"{what}: expected a list of strings")
    return cls(
        name=str(header["name"]),
        features=features,
        offsets=arrays["offsets"],
        labels=arrays.get("labels"),
        speakers=arrays.get("speakers"),
        conversation_ids=ids,
        split=[names[code] for code in codes],
        class_names=header["class_names"],
        source=str(header["source"]),
        utterance_ids=strings("utterance_ids"),
        speaker_names=header["speaker_names"],
        checked=True,
    )
