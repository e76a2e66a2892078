"""Files are written whole or not at all, and read with one clear sentence when they are not what they should be."""

import csv
import io
import os
import pickle
import tomllib

import pytest
import torch

from ada2i_fast import Ada2I
from ada2i_fast.training import RunError, checkpoint, load, model_of
from ada2i_fast.training.files import atomic, need, read_json, read_toml, write_csv, write_json, write_toml


@pytest.fixture
def saved(tmp_path, corpus, small):
    config = small()
    model = Ada2I(config)
    path = tmp_path / "best.pt"
    checkpoint.save(path, "model", config, checkpoint.describe(corpus), model=model.state_dict(), epoch=3, dev_weighted_f1=0.5)
    return path, config, model


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        with atomic(path) as file:
            file.write(b"half of the new")
            1 / 0
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_crash_while_saving_leaves_the_old_checkpoint(saved, corpus, monkeypatch):
    path, config, model = saved
    before = path.read_bytes()

    def crash(values, file):
        file.write(b"PK\x03\x04 half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(RunError, match="best.pt cannot be written: No space left on device"):
        checkpoint.save(path, "model", config, checkpoint.describe(corpus), model=model.state_dict(), epoch=4, dev_weighted_f1=0.6)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["best.pt"]


def test_the_mode_is_the_usual_one(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic(tmp_path / "file") as file:
        file.write(b"x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_checkpoint_comes_back(saved, corpus):
    path, config, model = saved
    values = load(path, "model")
    assert values["config"] == config.to_dict() and values["epoch"] == 3
    assert values["corpus"]["class_names"] == corpus.class_names and values["corpus"]["widths"] == corpus.widths
    again = model_of(values, str(path))
    assert again.config == config and not again.training
    for name, x in model.state_dict().items():
        assert torch.equal(x, again.state_dict()[name])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("what, sentence", [
    ("missing", "cannot be read: No such file"),
    ("directory", "cannot be read: Is a directory"),
    ("text", "is not a checkpoint of ada2i_fast"),
    ("empty", "is not a checkpoint of ada2i_fast"),
    ("truncated", "is truncated, or not a checkpoint"),
    ("state_dict", "is not a checkpoint of ada2i_fast"),
    ("code", "is truncated, or not a checkpoint"),
    ("newer", "has checkpoint version 99, this package reads version 1"),
    ("part", "is damaged: a part of it is missing"),
    ("kind", "is a checkpoint of a model, expected one of a run"),
])
def test_bad_checkpoints(saved, tmp_path, monkeypatch, what, sentence):
    good, _, model = saved
    monkeypatch.chdir(tmp_path)
    path, kind = tmp_path / "bad.pt", None
    if what == "directory":
        path.mkdir()
    elif what == "text":
        path.write_text("hello")
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "truncated":
        path.write_bytes(good.read_bytes()[:-1000])
    elif what == "state_dict":
        torch.save(model.state_dict(), path)
    elif what == "code":
        torch.save({"format": checkpoint.FORMAT, "x": Evil()}, path)
    elif what in ("newer", "part"):
        values = load(good)
        values.update(version=99) if what == "newer" else values.pop("model")
        torch.save(values, path)
    elif what == "kind":
        path, kind = good, "run"
    with pytest.raises(RunError) as caught:
        load(path, kind)
    assert sentence in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_pickles_are_not_opened(tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(RunError, match="is not a checkpoint"):
        load(tmp_path / "x.pt")


def test_a_model_that_does_not_fit(saved):
    path, _, _ = saved
    values = load(path)
    values["config"]["hidden_dim"] = 7
    with pytest.raises(RunError, match="does not fit this package"):
        model_of(values, str(path))


def test_toml_round_trip(tmp_path):
    values = {"a": 1, "b": 1e-8, "c": True, "d": 'quote " backslash \\ ä 💡 \n', "e": ["a", "t"], "f": {"t": 6, "a b": 8}, "g": "none"}
    write_toml(tmp_path / "x.toml", {**values, "g": None}, "two\nlines")
    assert tomllib.loads((tmp_path / "x.toml").read_text()) == values == read_toml(tmp_path / "x.toml")


def test_csv_and_json(tmp_path):
    write_csv(tmp_path / "x.csv", [{"a": 1, "b": 'x,"y"'}, {"a": 2.5}], ["a", "b"])
    assert list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text()))) == [{"a": "1", "b": 'x,"y"'}, {"a": "2.5", "b": ""}]
    write_json(tmp_path / "x.json", {"ä": [1, None]})
    assert read_json(tmp_path / "x.json") == {"ä": [1, None]}
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(RunError, match="x.json is damaged"):
        read_json(tmp_path / "x.json")


def test_what_is_missing_is_named():
    with pytest.raises(RunError) as caught:
        need("no_such_package.part", "flying")
    assert str(caught.value) == 'flying needs no_such_package, which is not installed: pip install "ada2i_fast[train]"'
