"""Pickles that must be read, and pickles that must not."""

import collections
import os
import pickle
import pickletools
import struct
import sys

import numpy as np
import pytest

from ada2i_fast.data import CorpusError, restricted_load


def load(tmp_path, data, protocol=None):
    path = tmp_path / "p.pkl"
    path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data, protocol=protocol))
    return restricted_load(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(24.0).reshape(2, 3, 4).transpose(1, 2, 0),
        np.arange(6)[::2],
        np.array(["ab", "c"]),
        np.array([True, False]),
        np.array([1, 2], dtype=">i4"),
        np.array([1, "x", None], dtype=object),
        np.array(3.5),
        np.zeros((0, 4)),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_arrays(tmp_path, array, protocol):
    got = load(tmp_path, {"x": [array, array]}, protocol)["x"][1]
    native = pickle.loads(pickle.dumps(array, protocol))  # numpy swaps foreign byte orders on the way
    assert got.dtype == native.dtype and got.shape == array.shape
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_containers_and_scalars(tmp_path, protocol):
    factory = collections.defaultdict(list)
    factory["a"].append(1)
    data = {
        "set": {1, 2},
        "frozen": frozenset([3]),
        "tuple": (1, 2.5, None, True, 1 << 80),
        "bytes": b"\0\xff",
        "empty": b"",
        "bytearray": bytearray(b"xy"),
        "complex": 1 + 2j,
        "ordered": collections.OrderedDict(b=1),
        "default": factory,
        "text": "é☃",
        "scalar": np.float64(2.5),
        "int": np.int64(7),
    }
    got = load(tmp_path, data, protocol)
    assert got == data
    assert type(got["default"]) is dict and type(got["ordered"]) is dict


PYTHON2 = (
    # What python 2 and its numpy write for {'a': array([1., 2.], float32)}: names of the old modules, data as a str.
    b"\x80\x02}q\x00U\x01aq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85q\x04U\x01bq\x05\x87q\x06Rq\x07("
    b"K\x01K\x02\x85q\x08cnumpy\ndtype\nq\tU\x02f4q\nK\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01<q\rNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0eb"
    b"\x89U\x08\x00\x00\x80?\x00\x00\x00\xc0q\x0ftq\x10bs."
)


def test_python_2(tmp_path):
    np.testing.assert_array_equal(load(tmp_path, PYTHON2)["a"], np.float32([1, -2]))


class Sample:
    pass


@pytest.mark.parametrize("module", ["cogmen.Sample", "cogmen.utils", "Sample", "corect"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_known_records_become_dictionaries(tmp_path, monkeypatch, module, protocol):
    import types

    for part in {module.split(".")[0], module}:
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setattr(sys.modules[module], "Sample", Sample, raising=False)
    monkeypatch.setattr(Sample, "__module__", module)
    sample = Sample()
    sample.vid, sample.text = "v", np.arange(3.0)
    got = load(tmp_path, [sample, sample], protocol)
    assert type(got[0]) is dict and got[0]["vid"] == "v" and got[1]["text"].tolist() == [0, 1, 2]


class Call:
    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


class Stranger:
    pass


class Persistent(pickle.Pickler):
    def persistent_id(self, value):
        return "outside" if value == "secret" else None


def persistent(tmp_path, protocol):
    with open(tmp_path / "x", "wb") as file:
        Persistent(file, protocol).dump(["secret"])
    return (tmp_path / "x").read_bytes()


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_hostile_calls_do_not_run(tmp_path, protocol):
    flag = tmp_path / "flag"
    for hostile, name in [
        (Call(os.system, f"touch {flag}"), "system"),
        (Call(eval, f"open({str(flag)!r}, 'w')"), "eval"),
        (Call(getattr, [], "append"), "getattr"),
        (Call(np.fromfile, __file__), "fromfile"),
        (Call(open, str(flag), "w"), "open"),
        (np.array([Call(os.system, f"touch {flag}")], dtype=object), "system"),
        ({Call(os.system, f"touch {flag}")}, "system"),
        (Stranger(), "Stranger"),
        (Stranger, "Stranger"),
    ]:
        with pytest.raises(CorpusError, match=f"p.pkl: refused to unpickle .*{name}"):
            load(tmp_path, hostile, protocol)
    assert not flag.exists()
    with pytest.raises(CorpusError, match="persistent id"):
        load(tmp_path, persistent(tmp_path, protocol))


def test_torch_tensors_are_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    with pytest.raises(CorpusError, match="torch._utils._rebuild_tensor.*numpy arrays instead"):
        load(tmp_path, {"text": torch.zeros(2)})
    torch.save({"x": torch.zeros(2)}, tmp_path / "t.pkl")
    with pytest.raises(CorpusError, match="zip archive"):
        restricted_load(tmp_path / "t.pkl")


def raw(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


def name(module, attribute):
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


@pytest.mark.parametrize(
    "data",
    [
        # an object array whose dtype claims to be plain: its bytes would be taken for pointers
        raw(
            name("numpy.core.multiarray", "_reconstruct"),
            name("numpy", "ndarray"),
            b"K\x00\x85U\x01b\x87R(K\x01K\x01\x85",
            name("numpy", "dtype"),
            b"U\x02O8K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08AAAAAAAAtb",
        ),
        # a shape beyond its data
        raw(
            name("numpy.core.multiarray", "_reconstruct"),
            name("numpy", "ndarray"),
            b"K\x00\x85U\x01b\x87R(K\x01J\xff\xff\xff\x7f\x85",
            name("numpy", "dtype"),
            b"U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08AAAAAAAAtb",
        ),
        raw(name("numpy", "dtype"), b"U\x02V8K\x00K\x01\x87R"),  # void
        raw(name("numpy", "ndarray"), b"K\x05\x85R"),  # ndarray(5) reads raw memory
        raw(name("numpy", "ndarray"), b"K\x05\x85\x81"),
        raw(name("numpy", "ndarray"), b"}U\x01aK\x01sb"),  # state on a class
        raw(name("numpy.core.multiarray", "_reconstruct"), name("builtins", "list"), b"K\x00\x85U\x01b\x87R"),
        raw(name("_codecs", "encode"), b"X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R"),
        raw(name("builtins", "bytearray"), b"J\xff\xff\xff\x7f\x85R"),  # bytearray(2**31 - 1)
        raw(name("builtins", "bytes"), b"J\xff\xff\xff\x7f\x85R"),
        raw(name("builtins", "list.__class__"), b")R"),
        raw(name("collections", "defaultdict"), name("builtins", "eval"), b"\x85R"),
        raw(name("copyreg", "_reconstructor"), name("builtins", "list"), name("builtins", "object"), b"N\x87R"),
        raw(b"(U\x01aios\nsystem\n"),  # INST
        raw(b"(", name("builtins", "list"), b"o"),  # OBJ
        raw(name("builtins", "list"), b")}\x92"),  # NEWOBJ_EX
        raw(b"\x82\x01"),  # EXT1
        raw(b"U\x01aU\x01b\x85R"),  # calling a string
        raw(b"]}b"),  # state on a list
    ],
)
def test_forged_instructions(tmp_path, data):
    with pytest.raises(CorpusError, match="p.pkl: refused to unpickle"):
        load(tmp_path, data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b"abc.",  # a bytearray of a terabyte
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc.",  # bytes of a terabyte
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"U",  # a frame of a terabyte
        b"\x80\x02Nr\xff\xff\xff\xff" + b"U",  # memo index 2**32 - 1, then cut
        b"hello world, no pickle",
        b"\x80\x63N.",  # protocol 99
        b"\x80\x02(.",
        b"\x80\x02h\x05.",
    ],
)
def test_damage_costs_nothing(tmp_path, data):
    with pytest.raises(CorpusError, match="p.pkl is (truncated|damaged)"):
        load(tmp_path, data)


def test_a_bytearray_is_not_allocated_before_it_is_read(tmp_path):
    with pytest.raises(CorpusError, match="truncated"):  # not MemoryError, which would be "damaged"
        load(tmp_path, b"\x80\x05\x96" + struct.pack("<Q", 1 << 50) + b"abc.")


def test_every_truncation_is_an_error(tmp_path):
    whole = pickle.dumps({"a": np.arange(4.0), "b": ["x", {1}]}, protocol=4)
    for end in range(len(whole)):
        with pytest.raises(CorpusError, match="p.pkl"):
            load(tmp_path, whole[:end])


def test_flipped_bits_read_or_are_a_corpus_error(tmp_path):
    whole = pickle.dumps({"a": np.arange(3.0), "b": ["x", {1}, np.int64(2)]}, protocol=2)
    for position in range(len(whole)):
        for bit in range(position % 2, 8, 2):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            try:
                load(tmp_path, bytes(changed))
            except CorpusError:
                pass


def test_no_file_and_no_content(tmp_path):
    with pytest.raises(CorpusError, match="absent.pkl cannot be read: No such file"):
        restricted_load(tmp_path / "absent.pkl")
    with pytest.raises(CorpusError, match="p.pkl is empty"):
        load(tmp_path, b"")


def test_the_forgeries_are_well_formed():
    """So that they are refused for what they ask, not for how they are spelt."""
    pickletools.dis(PYTHON2, out=open(os.devnull, "w"))
    assert pickle.loads(PYTHON2, encoding="latin1")["a"].tolist() == [1, -2]
