"""Reading pickles from strangers.

The pickle machine runs in Python with its dangerous instructions replaced: a class or function named by the file is never looked up,
it is matched against the short table below, and what the table holds are builders of this module, which check their arguments before
they call numpy. Calling anything else, or setting state on anything else, ends the load. The Python machine is used, not the C one,
because its memo is a dictionary: a forged memo index costs nothing there, and gigabytes in the other.
"""

from __future__ import annotations

import mmap
import os
import pickle
import re
from typing import Any

import numpy as np

from .errors import CorpusError

# The kinds of numpy element that are plain numbers or text. Void, date and structured elements are not.
_PLAIN = re.compile(r"[biufcSU]\d{0,9}|\?")


class _Refused(Exception):
    pass


class _Name:
    """Stands for a name in the file. Not callable: only `_call` may act on it, by identity."""

    __slots__ = ("build", "name")

    def __init__(self, name, build):
        self.name, self.build = name, build

    def __hash__(self):
        return id(self)


class _Dtype:
    """A dtype as the file describes it. Only the kind, size and byte order are believed, never its flags."""

    __slots__ = ("code", "order")

    def __init__(self, code, align=False, copy=False):
        if isinstance(code, bytes):
            code = code.decode("latin1")
        if not isinstance(code, str):
            raise _Refused(f"a numpy dtype described by {_what(code)}")
        order = "="
        if code[:1] in "<>|=":
            order, code = code[0], code[1:]
        if code not in ("O", "O8", "O4") and not _PLAIN.fullmatch(code):
            raise _Refused(f"numpy dtype {code!r}, which is not a plain number or text")
        self.code, self.order = code[:1] if code[0] == "O" else code, order

    def set(self, state):
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise _Refused("a malformed numpy dtype")
        if any(part is not None for part in state[2:5]):
            raise _Refused("a structured numpy dtype")
        self.order = state[1]

    def real(self):
        return np.dtype(self.code) if self.code == "O" else np.dtype(self.code).newbyteorder(self.order)


def _what(value):
    return value.name if isinstance(value, _Name) else f"a {type(value).__name__}"


def _need(condition, what):
    if not condition:
        raise _Refused(what)


def _shape(shape):
    _need(
        isinstance(shape, tuple) and len(shape) <= 32 and all(type(n) is int and 0 <= n < 2**62 for n in shape),
        "a numpy array with a malformed shape",
    )
    count = 1
    for n in shape:
        count *= n
    return count


def _bytes(raw):
    if isinstance(raw, str):  # python 2 strings, decoded as latin1
        raw = raw.encode("latin1")
    _need(isinstance(raw, (bytes, bytearray)), f"a numpy array whose data is {_what(raw)}")
    return raw


def _empty_array(*_):
    return np.empty(0, np.int8)


def _set_array(array, state):
    """What numpy's own __setstate__ does, after checking that shape, dtype and data belong together."""
    _need(
        isinstance(state, tuple) and len(state) in (4, 5) and isinstance(state[-3], _Dtype), "a malformed numpy array"
    )
    shape, dtype, fortran, raw = state[-4], state[-3].real(), bool(state[-2]), state[-1]
    count = _shape(shape)
    if dtype == object:
        _need(isinstance(raw, list) and len(raw) == count, "an object array whose length and shape differ")
    else:
        raw = bytes(_bytes(raw))
        _need(dtype.itemsize > 0 or not count, "a numpy array of elements of no size")
        _need(
            len(raw) == count * dtype.itemsize,
            f"a numpy array of shape {shape} and {dtype} with {len(raw)} bytes of data",
        )
    array.__setstate__((1, shape, dtype, fortran, raw))


def _frombuffer(raw, dtype, shape, order="C", axis_order=None):
    _need(isinstance(dtype, _Dtype) and dtype.code != "O", "a numpy array in a buffer without a plain dtype")
    real, raw = dtype.real(), _bytes(raw)
    count = _shape(shape)
    _need(real.itemsize > 0, "a numpy array of elements of no size")
    _need(len(raw) == count * real.itemsize, f"a numpy array of shape {shape} and {real} with {len(raw)} bytes of data")
    flat = np.frombuffer(raw, real, count) if count else np.empty(0, real)
    if order == "K" and axis_order is not None:
        _need(isinstance(axis_order, tuple) and sorted(axis_order) == list(range(len(shape))), "a malformed axis order")
        return flat.reshape(shape).transpose(axis_order)
    _need(order in ("C", "F"), "a numpy array of unknown order")
    return flat.reshape(shape, order=order)


def _scalar(dtype, raw=b""):
    _need(isinstance(dtype, _Dtype), "a numpy scalar without a dtype")
    if dtype.code == "O":
        return raw
    real, raw = dtype.real(), _bytes(raw)
    _need(len(raw) == real.itemsize and real.itemsize > 0, "a numpy scalar whose size and dtype differ")
    return np.frombuffer(raw, real)[0]


def _encode(text, encoding="latin1"):
    _need(isinstance(text, str) and encoding in ("latin1", "latin-1", "iso-8859-1"), f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _plain_bytes(source=b"", encoding=None):
    # bytes(10**12) would be a bomb, so a number is no source here.
    if isinstance(source, str):
        return _encode(source, encoding)
    _need(isinstance(source, (bytes, bytearray)), f"bytes made of {_what(source)}")
    return source


def _items(*source):
    _need(
        len(source) <= 1 and isinstance(source[0] if source else [], (list, tuple, set, frozenset)),
        "a container made of no list",
    )
    return source[0] if source else ()


def _complex(real=0.0, imag=0.0):
    _need(all(isinstance(part, (int, float)) for part in (real, imag)), "a malformed complex number")
    return complex(real, imag)


def _mapping(*pairs):
    result = {}
    for pair in _items(*pairs):
        _need(isinstance(pair, (list, tuple)) and len(pair) == 2, "a malformed mapping")
        result[pair[0]] = pair[1]
    return result


def _record(*_):
    return {}  # an instance of a known data class becomes the dictionary of its attributes


_FACTORIES = ("list", "dict", "set", "int", "float", "str", "tuple", "bool")
_BUILTINS = {
    "set": lambda *a: set(_items(*a)),
    "frozenset": lambda *a: frozenset(_items(*a)),
    "list": lambda *a: list(_items(*a)),
    "tuple": lambda *a: tuple(_items(*a)),
    "dict": _mapping,
    "bytes": _plain_bytes,
    "bytearray": lambda *a: bytearray(_plain_bytes(*a)),
    "complex": _complex,
    "object": None,
    **{name: None for name in ("int", "float", "str", "bool")},
}


def _table():
    table = {
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): _mapping,
        ("collections", "defaultdict"): lambda *a: {},
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table[module, "_reconstruct"] = _empty_array
        table[module, "scalar"] = _scalar
    for module in ("numpy.core.numeric", "numpy._core.numeric"):
        table[module, "_frombuffer"] = _frombuffer
    for module in ("builtins", "__builtin__"):
        table.update({(module, name): build for name, build in _BUILTINS.items()})
    for module in ("copyreg", "copy_reg"):
        table[module, "_reconstructor"] = _record
    # The data classes of COGMEN and CORECT: known by name, never imported.
    for package in ("cogmen", "corect"):
        for module in (package, f"{package}.Sample", f"{package}.utils"):
            table[module, "Sample"] = _record
    table["Sample", "Sample"] = table["__main__", "Sample"] = _record
    return {key: _Name(".".join(key), build) for key, build in table.items()}


class _Machine(pickle._Unpickler):
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file):
        super().__init__(file, fix_imports=False, encoding="latin1")
        self.names = _table()
        self.records = {
            id(name) for name in self.names.values() if name.build is _record and "_reconstructor" not in name.name
        }
        self.made: dict[int, dict] = {}  # records by id, kept alive so that an id is never reused

    def find_class(self, module, name):
        found = self.names.get((module, name))
        if found is None:
            hint = ""
            if module.split(".")[0] == "torch":
                hint = "; save the features as numpy arrays instead of torch tensors"
            elif name[:1].isupper():
                hint = "; save its attributes as plain dictionaries and numpy arrays"
            raise _Refused(f"{module}.{name}{hint}")
        return found

    def _call(self, target, args):
        _need(isinstance(target, _Name), f"a call of {_what(target)}")
        _need(isinstance(args, tuple), f"a call of {target.name} without arguments")
        name = target.name
        if name.endswith("._reconstruct"):
            _need(bool(args) and args[0] is self.names["numpy", "ndarray"], "a numpy array of another class")
        elif name.endswith("._reconstructor"):
            _need(
                bool(args) and isinstance(args[0], _Name) and id(args[0]) in self.records, "an object of unknown class"
            )
            target = args[0]
        elif name == "collections.defaultdict":
            _need(
                not args
                or args[0] is None
                or (isinstance(args[0], _Name) and args[0].name.split(".")[-1] in _FACTORIES),
                "a defaultdict with a foreign factory",
            )
        _need(target.build is not None, f"a call of {name}")
        result = target.build(*args)
        if id(target) in self.records:
            self.made[id(result)] = result
        return result

    def load_reduce(self):
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def load_newobj(self):
        self.load_reduce()

    def load_build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.ndarray):
            _set_array(target, state)
        elif isinstance(target, _Dtype):
            target.set(state)
        elif id(target) in self.made:
            _need(
                isinstance(state, dict) and all(isinstance(key, str) for key in state),
                "a record without named attributes",
            )
            target.update(state)
        else:
            raise _Refused(f"state set on {_what(target)}")

    def persistent_load(self, pid):
        raise _Refused("a persistent id, which points outside the file (torch.save writes them)")

    def refuse(self):
        raise _Refused("an instruction that builds arbitrary objects")

    for _code in (
        pickle.INST,
        pickle.OBJ,
        pickle.NEWOBJ_EX,
        pickle.EXT1,
        pickle.EXT2,
        pickle.EXT4,
        pickle.NEXT_BUFFER,
        pickle.READONLY_BUFFER,
    ):
        dispatch[_code[0]] = refuse
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self):
        # The stock version allocates what the file claims before it looks whether the file has it.
        size = int.from_bytes(self.read(8), "little")
        raw = self.read(size)
        if len(raw) != size:
            raise EOFError
        self.append(bytearray(raw))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def restricted_load(path: str | os.PathLike) -> Any:
    """Unpickle a file that may be hostile; nothing named in the file is ever imported or called.

    Admits None, numbers, text, bytes, lists, tuples, dictionaries, sets, numpy arrays and scalars of plain numbers, text or
    admitted objects. ``OrderedDict`` and ``defaultdict`` arrive as plain dictionaries, the ``Sample`` records of COGMEN and CORECT
    as dictionaries of their attributes. Text of Python 2 pickles is decoded as latin1.

    Raises `CorpusError` for everything else, and names it; also for truncated files and files that are no pickle.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise CorpusError(f"{path} is empty: expected a pickle")
            # Mapped, because a read past the end allocates nothing there, whatever length the file claims.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                if mapped[:2] == b"PK":
                    raise CorpusError(
                        f"{path} is a zip archive (torch.save, or an .npz under another name), not a pickle"
                    )
                return _Machine(mapped).load()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from None
    except CorpusError:
        raise
    except _Refused as refused:
        raise CorpusError(
            f"{path}: refused to unpickle {refused}; only numpy arrays and plain containers are admitted"
        ) from None
    except (EOFError, pickle.UnpicklingError) as error:
        raise CorpusError(f"{path} is truncated or not a pickle: {str(error) or 'it ends early'}") from None
    except Exception as error:  # a malformed pickle can fail in any instruction
        raise CorpusError(f"{path} is damaged or not a pickle ({type(error).__name__}: {error})") from None
