import csv
import json
import math
import random
import statistics
from dataclasses import replace

import pytest
import torch

from ada2i_fast import BalancedAdam
from ada2i_fast.data.corpus import Corpus
from ada2i_fast.training import RunError, fit, load, logs, loop, resolve_device, split


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Scripted:
    """Stands in for `evaluate`: a scripted dev W-F1 and dev loss per call, and what the model was at that time."""

    def __init__(self, f1, loss=None):
        self.f1, self.loss_values, self.states = f1, loss or [1.0] * len(f1), []

    def __call__(self, model, batches, device=None):
        call = len(self.states)
        self.states.append({name: x.clone() for name, x in model.state_dict().items()})
        f1 = self.f1[min(call, len(self.f1) - 1)]
        found = {"weighted_f1": f1, "accuracy": f1, "macro_f1": f1, "f1": {},
                 "unimodal": {m: {"weighted_f1": f1, "accuracy": f1} for m in model.config.modalities}}
        return type("P", (), {"loss": self.loss_values[min(call, len(self.loss_values) - 1)], "scores": lambda self, names: found})()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


# -- protocol ----------------------------------------------------------------------------------------------------------


def test_early_stopping_and_best_state(corpus, small, tmp_path, monkeypatch):
    script = Scripted([0.3, 0.5, 0.5, 0.4, 0.4, 0.9])                    # equal is not better
    monkeypatch.setattr(loop, "evaluate", script)
    found = fit(corpus, small(epochs=20, early_stopping=3), tmp_path, tensorboard=False)
    result = found["per_seed"][0]
    assert (result["epochs"], result["best_epoch"], result["dev_weighted_f1"]) == (5, 2, 0.5)
    assert "3 epochs without a better dev W-F1" in result["stopped"]
    assert len(script.states) == 6                                       # five times dev, once test
    assert same(script.states[1], script.states[5])                      # tested is the best state
    assert not same(script.states[4], script.states[5])
    best = load(tmp_path / "seed-12/best.pt", "model")
    assert best["epoch"] == 2 and same(best["model"], script.states[1])
    last = load(tmp_path / "seed-12/checkpoint.pt", "run")
    assert last["epoch"] == 5 and same(last["model"], script.states[4]) and same(last["best"]["model"], script.states[1])


def test_scheduler_follows_the_dev_loss(corpus, small, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", Scripted([0.5], [3.0, 2.0, 2.0, 2.0, 1.0, 1.0]))
    fit(corpus, small(epochs=6, scheduler_patience=1, learning_rate=1e-3), tmp_path, tensorboard=False)
    rates = [float(row["lr"]) for row in rows(tmp_path / "seed-12/epochs.csv")]
    assert rates == pytest.approx([1e-3] * 4 + [1e-4] * 2)               # two epochs on a plateau, patience 1


@pytest.mark.parametrize("dev_split", ["official", "first_tenth", "random_tenth"])
def test_batches_are_those_of_the_released_loader(corpus, small, tmp_path, monkeypatch, dev_split):
    seen = []
    original = Corpus.batch
    monkeypatch.setattr(Corpus, "batch", lambda self, index, **k: (seen.append(list(index)), original(self, index, **k))[1])
    config = small(dev_split=dev_split, seed=5, epochs=2)
    fit(corpus, config, tmp_path, tensorboard=False)

    random.seed(5)                                                       # what the released script does, with its global generator
    train, dev = corpus.conversations("train").tolist(), corpus.conversations("dev").tolist()
    if dev_split != "official":
        train = train + dev
        if dev_split == "random_tenth":
            random.shuffle(train)
        train, dev = train[len(train) // 10:], train[:len(train) // 10]
    expected = [dev[:4]] + [corpus.conversations("test").tolist()]
    for _ in range(2):
        random.shuffle(train)
        expected += [train[i:i + 4] for i in range(0, len(train), 4)]
    assert seen == expected


def test_modulation_only_between_its_epochs(corpus, small, tmp_path, monkeypatch):
    given = []
    original = BalancedAdam.step
    monkeypatch.setattr(BalancedAdam, "step", lambda self, ratio=None, closure=None: (given.append(ratio), original(self, ratio))[1])
    fit(corpus, small(epochs=4, modulation_start=2, modulation_end=3), tmp_path / "a", tensorboard=False)
    steps = len(given) // 4
    assert [ratio is not None for ratio in given[::steps]] == [False, True, True, False]
    for row in rows(tmp_path / "a/seed-12/epochs.csv"):
        coefficients = [float(row[f"coefficient_{m}"]) for m in "atv"]
        assert (coefficients == [1, 1, 1]) == (row["epoch"] in "14")
        assert min(coefficients) > 0 and min(float(row[f"ratio_{m}"]) for m in "atv") >= 1
    given.clear()
    fit(corpus, small(epochs=1, modulation=False), tmp_path / "b", tensorboard=False)
    assert set(given) == {None}


def test_a_loss_that_is_not_finite_ends_the_seed(corpus, small, tmp_path, monkeypatch):
    said = []
    with pytest.raises(RunError, match="training loss became .* before there was a best state; try a lower learning_rate"):
        fit(corpus, small(beta=1e30, afw_layers=2), tmp_path / "a", tensorboard=False, say=said.append)
    assert any("training ends here" in line for line in said)

    original = loop._Run._train
    monkeypatch.setattr(loop._Run, "_train", lambda run, epoch: {**original(run, epoch), **({"train_loss": math.nan} if epoch == 3 else {})})
    result = fit(corpus, small(epochs=9), tmp_path / "b", tensorboard=False)["per_seed"][0]
    assert result["epochs"] == 2 and result["stopped"] == "the training loss became nan in epoch 3"


def test_only_a_split_with_conversations(corpus, small):
    for name, what in (("train", "training"), ("dev", "development"), ("test", "test")):
        other = replace(corpus, split=["" if s == name else s for s in corpus.split])
        with pytest.raises(RunError, match=f"has no {what} conversations"):
            split(other, small())


# -- same numbers ------------------------------------------------------------------------------------------------------


def numbers(directory, seed):
    """Everything of a seed but the times."""
    history = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows(directory / f"seed-{seed}/epochs.csv")]
    result = json.loads((directory / f"seed-{seed}/result.json").read_text())
    return history, {k: v for k, v in result.items() if k != "seconds"}


def test_same_seed_same_numbers(corpus, small, tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    fit(corpus, small(epochs=2), tmp_path / "a", tensorboard=False)
    assert torch.equal(torch.get_rng_state(), before)                    # the caller's random numbers are untouched
    torch.manual_seed(1)
    fit(corpus, small(epochs=2), tmp_path / "b", tensorboard=False)
    fit(corpus, small(epochs=2, seed=13), tmp_path / "c", tensorboard=False)
    assert numbers(tmp_path / "a", 12) == numbers(tmp_path / "b", 12)
    assert numbers(tmp_path / "a", 12)[0] != numbers(tmp_path / "c", 13)[0]


@pytest.mark.parametrize("preset, every", [("published", 1), ("released", 1), ("published", 2)])
def test_resume_equals_no_interruption(corpus, small, tmp_path, preset, every):
    config = small(preset, epochs=4, modulation_start=2, scheduler_patience=0, encoder="lstm" if preset == "released" else "transformer")
    fit(corpus, config, tmp_path / "whole", tensorboard=False, seeds=[12, 13])

    def cut(line):
        epoch = line.split()[1].split("/")[0] if line.startswith("epoch") else ""
        if epoch == "3" and "seed 13 (2 of 2)" in said:
            raise KeyboardInterrupt
        said.append(line)

    said = []
    with pytest.raises(KeyboardInterrupt):
        fit(corpus, config, tmp_path / "cut", tensorboard=False, seeds=[12, 13], checkpoint_every=every, say=cut)
    assert not (tmp_path / "cut/results.csv").exists() and not (tmp_path / "cut/seed-13/result.json").exists()
    said = []
    found = fit(corpus, config, tmp_path / "cut", tensorboard=False, seeds=[12, 13], resume=True, say=said.append)
    assert "seed 12: finished before" in said and f"seed 13: resumed after epoch {3 // every * every}" in said
    for seed in (12, 13):
        assert numbers(tmp_path / "whole", seed) == numbers(tmp_path / "cut", seed)
        for name in ("best.pt", "checkpoint.pt"):
            one, other = (load(tmp_path / d / f"seed-{seed}" / name) for d in ("whole", "cut"))
            assert same(one["model"], other["model"])
    assert found["seeds"] == [12, 13]


def test_resume_refuses_another_configuration_or_corpus(corpus, small, tmp_path):
    fit(corpus, small(epochs=1), tmp_path, tensorboard=False)
    (tmp_path / "seed-12/result.json").unlink()
    with pytest.raises(RunError, match="of another configuration: alpha is 0.1 there and 0.2 here"):
        fit(corpus, small(epochs=1, alpha=0.2), tmp_path, tensorboard=False, resume=True)
    with pytest.raises(RunError, match="of another corpus: 20 conversations there and 19 here"):
        fit(corpus.select(range(19)), small(epochs=1), tmp_path, tensorboard=False, resume=True)
    other = replace(corpus, class_names=["x", *corpus.class_names[1:]])
    with pytest.raises(RunError, match="was trained with classes"):
        fit(other, small(epochs=1), tmp_path, tensorboard=False, resume=True)


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_of_a_run(corpus, small, tmp_path):
    pytest.importorskip("tensorboard")
    found = fit(corpus, small(epochs=2, modalities="ta"), tmp_path, seeds=[1, 2])
    history = rows(tmp_path / "seed-1/epochs.csv")
    assert list(history[0]) == logs.epoch_columns("ta") and [row["epoch"] for row in history] == ["1", "2"]
    assert all(math.isfinite(float(x)) for row in history for x in row.values())
    table = rows(tmp_path / "results.csv")
    assert [row["seed"] for row in table] == ["1", "2", "mean", "std"]
    scores = [json.loads((tmp_path / f"seed-{n}/result.json").read_text())["test"]["weighted_f1"] for n in (1, 2)]
    assert [float(row["weighted_f1"]) for row in table] == pytest.approx([*scores, statistics.mean(scores), statistics.stdev(scores)])
    assert {f"f1_{name}" for name in corpus.class_names} | {"t_weighted_f1", "a_accuracy", "accuracy"} <= set(table[0])
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert not list(tmp_path.rglob("*.part"))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "tensorboard/seed-1"))
    events.Reload()
    assert [e.value for e in events.Scalars("ratio/t")] == pytest.approx([float(row["ratio_t"]) for row in history])
    assert {"coefficient/a", "unimodal_weighted_f1/t", "dev/weighted_f1", "loss/train"} <= set(events.Tags()["scalars"])


def test_without_tensorboard_it_is_said_and_goes_on(corpus, small, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    said = []
    fit(corpus, small(epochs=1), tmp_path, say=said.append)
    assert [line for line in said if "tensorboard" in line] == [
        'note: TensorBoard logging needs tensorboard, which is not installed: pip install "ada2i_fast[train]"']


def test_results_table():
    def result(seed, f1):
        return {"seed": seed, "best_epoch": 1, "epochs": 2, "dev_weighted_f1": 0.5, "seconds": 1.0, "test": {
            "weighted_f1": f1, "accuracy": 0.25, "macro_f1": 0.1, "f1": {"joy": f1}, "unimodal": {"t": {"weighted_f1": 0.1, "accuracy": 0.2}}}}
    two = logs.results([result(1, 0.5), result(2, 0.6)])
    assert two["std"]["weighted_f1"] == pytest.approx(0.1 / math.sqrt(2))
    text = logs.results_table(two).splitlines()
    assert text[0].split() == ["test", "score,", "%", "seed", "1", "seed", "2", "mean", "std"]
    assert text[2].split() == ["weighted", "F1", "50.00", "60.00", "55.00", "±", "7.07"]
    assert [line.split("  ")[0] for line in text[2:]] == ["weighted F1", "accuracy", "F1 joy", "t alone, weighted F1", "t alone, accuracy"]
    assert logs.results_table(logs.results([result(1, 0.5)])).splitlines()[2].split()[-2:] == ["50.00", "-"]


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input(corpus, small, tmp_path):
    with pytest.raises(RunError, match="no labels to train on"):
        fit(replace(corpus, labels=None), small(), tmp_path)
    with pytest.raises(RunError, match="seeds: expected one or more distinct seeds"):
        fit(corpus, small(), tmp_path, seeds=[1, 1])
    with pytest.raises(RunError, match="modality 't': the configuration says 99 features, corpus synthetic has 10"):
        fit(corpus, small().replace(input_widths={"t": 99, "a": 8, "v": 9}), tmp_path)
    with pytest.raises(RunError, match="num_classes: expected 6"):
        fit(corpus, small().replace(num_classes=7), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "mps"])
def test_devices_that_are_not_there(name):
    with pytest.raises(RunError, match="device"):
        resolve_device(name)
    assert resolve_device("cpu").type == "cpu"
