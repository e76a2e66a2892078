"""The command: every subcommand, its files, and one clear sentence with exit status 2 for everything a user can get wrong."""

import dataclasses
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from ada2i_fast import Ada2I, Ada2IConfig, cli
from ada2i_fast.cli import main
from ada2i_fast.data import Corpus, synthetic_corpus
from ada2i_fast.training.files import read_toml

TINY = ["--hidden-dim", "6", "--tensor-rank", "2", "--feedforward-dim", "8", "--encoder-layers", "1", "--afw-layers", "1",
        "--batch-size", "4", "--epochs", "2", "--learning-rate", "3e-3", "--alpha", "0.1", "--no-tensorboard", "--quiet", "--device", "cpu"]


@pytest.fixture(scope="module")
def corpus():
    return synthetic_corpus(3, 20, min_length=2, max_length=4, widths={"t": 10, "a": 8, "v": 9}, name="talk")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """A directory with talk.ada2i and a run of two seeds."""
    folder = tmp_path_factory.mktemp("trained")
    corpus.save(folder / "talk.ada2i")
    assert main(["train", "--corpus", str(folder / "talk.ada2i"), "--seeds", "12,15", "-o", str(folder / "run"), *TINY]) == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, corpus):
    monkeypatch.chdir(tmp_path)
    corpus.save("talk.ada2i")
    return tmp_path


def fails(capsys, *argv):
    """The one sentence on stderr of a command that must end with status 2."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("ada2i-fast: error: "), captured.err
    return lines[0].removeprefix("ada2i-fast: error: ")


def train(*more):
    return main(["train", *TINY, *map(str, more)])


# -- train -------------------------------------------------------------------------------------------------------------


def test_train_leaves_and_prints_its_results(here, capsys):
    assert train("--corpus", "talk.ada2i", "--seeds", "2", "-o", "run") == 0
    text = capsys.readouterr().out
    assert "seed 12" in text and "seed 13" in text and "weighted F1" in text and "± " in text
    assert all(f"F1 {name}" in text for name in ("calm", "angry")) and all(f"{m} alone, weighted F1" in text for m in "tav")
    assert "saved to run: results.csv" in text
    for name in ("config.toml", "results.csv", "results.json", *(f"seed-{n}/{f}" for n in (12, 13) for f in (
            "best.pt", "checkpoint.pt", "epochs.csv", "result.json"))):
        assert (here / "run" / name).is_file()
    assert not (here / "run/tensorboard").exists()
    assert not list(here.rglob(".*"))


def test_train_without_arguments_is_the_synthetic_corpus_with_the_published_preset(here, monkeypatch, capsys):
    called = {}

    def fit(corpus, config, output, **options):
        called.update(corpus=corpus, config=config, output=output, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("ada2i_fast.training.fit", fit)
    assert main(["train"]) == 130
    assert "continue with: ada2i-fast train --resume runs/synthetic-published-" in capsys.readouterr().err
    assert called["corpus"].name == "synthetic" and called["seeds"] == [12] and called["tensorboard"]
    assert called["config"] == Ada2IConfig.published("synthetic", input_widths=called["corpus"].widths)
    assert called["output"].startswith(os.path.join("runs", "synthetic-published-"))


@pytest.mark.parametrize("name, classes, dataset", [
    ("iemocap", 6, "iemocap"), ("IEMOCAP", 4, "iemocap4"), ("MELD", 7, "meld"), ("mosei", 2, "mosei2"), ("CMU", 6, None),
    ("mosei", 7, "mosei7"), ("mosi", 2, "mosi"), ("synthetic", 6, "synthetic")])
def test_sizes_by_the_name_of_the_corpus(corpus, name, classes, dataset):
    fields = dict(name=name, class_names=[str(i) for i in range(classes)], labels=corpus.labels % classes)
    said = []
    config = cli._config(replace(corpus, **fields), "released", None, {}, said.append)
    expected = Ada2IConfig.released(dataset or "synthetic", input_widths=corpus.widths, num_classes=classes)
    assert config == expected and bool(said) == (dataset is None)


def test_flags_override_the_file_which_overrides_the_preset(here, capsys):
    (here / "c.toml").write_text('preset = "released"\ncorpus = "talk.ada2i"\nseeds = [3, 4]\ndropout = 0.25\nbeta = 0.5\nmodalities = "ta"\n'
                                 "cosine_bias = false\n")
    assert train("--config", "c.toml", "--beta", "0.75", "--set", "clip_norm=1", "--set", "beta=9", "--seeds", "1", "--modulation", "-o", "run") == 0
    values = read_toml("run/config.toml")
    assert (values["preset"], values["dropout"], values["beta"], values["clip_norm"]) == ("released", 0.25, 0.75, 1.0)
    assert values["modalities"] == ["t", "a"] and values["seeds"] == [12] and values["padding"] == "attended"
    assert values["cosine_bias"] is False and values["input_widths"] == {"t": 10, "a": 8, "v": 9}
    assert values["corpus"] == str(here / "talk.ada2i")


def test_precision(here, capsys, monkeypatch):
    """bfloat16 steps, by the flag and by the file: other numbers than float32's, a finite loss, and remembered in the run."""
    seen = []
    monkeypatch.setattr("ada2i_fast.model.Ada2I._run", lambda self, batch, run=Ada2I._run: seen.append(
        (self.training, torch.is_autocast_enabled("cpu"))) or run(self, batch))
    (here / "c.toml").write_text('precision = "bfloat16"\n')
    for number, given in enumerate((["--precision", "bfloat16"], ["--config", "c.toml"])):
        seen.clear()
        assert train("--corpus", "talk.ada2i", "--epochs", "1", "-o", f"half{number}", *given) == 0
        assert set(seen) == {(True, True), (False, False)}                  # evaluation is float32
        assert read_toml(f"half{number}/config.toml")["precision"] == "bfloat16"
    assert "precision: expected float32 or bfloat16, got 'half'" in fails(capsys, "train", "--corpus", "talk.ada2i", "--precision", "half")
    assert "--resume takes everything from half0; leave out --precision" in fails(capsys, "train", "--resume", "half0", "--precision", "float32")


def test_the_effective_configuration_repeats_the_run(trained, tmp_path):
    assert main(["train", "--config", str(trained / "run/config.toml"), "-o", str(tmp_path / "again"), "-q", "--no-tensorboard", "--device", "cpu"]) == 0
    one, two = (json.loads((d / "results.json").read_text()) for d in (trained / "run", tmp_path / "again"))
    assert [r["test"] for r in one["per_seed"]] == [r["test"] for r in two["per_seed"]]
    assert read_toml(trained / "run/config.toml") == read_toml(tmp_path / "again/config.toml")


@pytest.mark.parametrize("flag, value, field, expected", [
    ("--modalities", "t,v", "modalities", ("t", "v")), ("--modalities", "vt", "modalities", ("v", "t")),
    ("--attention-scale", "none", "attention_scale", None), ("--attention-scale", "2", "attention_scale", 2.0),
    ("--encoder-heads", "t=5,a=2", "encoder_heads", {"t": 5, "a": 2}), ("--noise", "none", "noise", "none"),
    ("--no-afw", None, "afw", False), ("--amw", None, "amw", True), ("--epochs", "7", "epochs", 7)])
def test_options_become_values(flag, value, field, expected):
    args = cli._parser().parse_args(["train", flag, *([value] if value else [])])
    assert cli._value(field, getattr(args, field)) == expected


def test_every_option_is_there_with_help():
    text = next(a for a in cli._parser()._actions if a.dest == "command").choices["train"].format_help()
    for f in dataclasses.fields(Ada2IConfig):
        if f.name not in ("input_widths", "num_classes"):
            assert f"--{f.name.replace('_', '-')} " in text and cli._HELP[f.name]


def test_resume_goes_on(trained, tmp_path, capsys):
    import shutil

    shutil.copytree(trained / "run", tmp_path / "run")
    whole = json.loads((tmp_path / "run/results.json").read_text())
    for name in ("results.json", "results.csv", "seed-15/result.json"):
        (tmp_path / "run" / name).unlink()
    assert main(["train", "--resume", str(tmp_path / "run"), "--no-tensorboard", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "seed 12: finished before" in text and "seed 15: resumed after epoch 2" in text
    again = json.loads((tmp_path / "run/results.json").read_text())
    assert again["per_seed"] == whole["per_seed"]


# -- evaluate, predict, prepare, info, bench ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [12, 15])
def test_evaluate_equals_the_numbers_of_training(trained, tmp_path, capsys, seed):
    result = json.loads((trained / f"run/seed-{seed}/result.json").read_text())
    checkpoint = trained / f"run/seed-{seed}" / ("best.pt" if seed == 12 else "checkpoint.pt")
    assert main(["evaluate", str(checkpoint), "-o", str(tmp_path / "new"), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "precision" in text and "weighted avg" in text and "t alone: W-F1" in text
    found = json.loads((tmp_path / "new/report-test.json").read_text())
    assert found["scores"] == result["test"]
    assert sum(map(sum, found["confusion"])) == found["report"]["weighted avg"]["support"]
    png = (tmp_path / "new/confusion-test.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", png[16:24])) > 100
    assert main(["evaluate", str(checkpoint), "--split", "dev", "-o", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "report-dev.json").read_text())["scores"]["weighted_f1"] == result["dev_weighted_f1"]


def test_a_run_stands_for_its_best_seed(trained):
    score = {n: json.loads((trained / f"run/seed-{n}/result.json").read_text())["dev_weighted_f1"] for n in (12, 15)}
    best = trained / f"run/seed-{max(score, key=score.get)}/best.pt"
    assert cli._checkpoint(str(trained / "run")) == str(best)
    assert cli._checkpoint(str(trained / "run/seed-15")) == str(trained / "run/seed-15/best.pt")


def test_predict_without_labels(trained, tmp_path, capsys, corpus):
    ids = [f"u{i}" for i in range(corpus.num_utterances)]
    replace(corpus, labels=None, split=[""] * 20, utterance_ids=ids, class_names=[], name="new").save(tmp_path / "new.ada2i")
    argv = ["predict", str(trained / "run/seed-12"), "--corpus", str(tmp_path / "new.ada2i"), "--device", "cpu"]
    assert main(argv) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["utterance"] for line in lines] == ids
    assert [line["conversation"] for line in lines] == np.repeat(corpus.conversation_ids, corpus.lengths).tolist()
    assert lines[0]["index"] == 0 and lines[1]["index"] == 1
    for line in lines:
        assert list(line["probabilities"]) == corpus.class_names and sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)
    assert main([*argv, "-o", str(tmp_path / "p.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == lines
    assert capsys.readouterr().out == ""

    # The same labels as those behind the accuracy of the training's result, conversation by conversation.
    assert main(["predict", str(trained / "run/seed-12"), "--corpus", str(trained / "talk.ada2i"), "--split", "test"]) == 0
    said = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    gold = [corpus.class_names[y] for y in corpus.labels[corpus.rows(corpus.conversations("test"))]]
    result = json.loads((trained / "run/seed-12/result.json").read_text())
    assert np.mean([a == b for a, b in zip(said, gold)]) == pytest.approx(result["test"]["accuracy"])


def test_prepare(here, corpus, capsys):
    names = {"text": "t", "audio": "a", "visual": "v"}
    np.savez("meld.npz", **{name: corpus.features[m] for name, m in names.items()}, label=corpus.labels, speaker=corpus.speakers,
             conversation_offsets=corpus.offsets, conversation_id=np.array(list(corpus.conversation_ids)),
             split=np.array([s for s in corpus.split]), utterance_id=np.array([str(i) for i in range(corpus.num_utterances)]),
             label_names=np.array(corpus.class_names))
    assert main(["prepare", "meld.npz", "--task", "other", "--name", "mine", "-o", "mine.ada2i"]) == 0
    text = capsys.readouterr().out
    assert "saved to mine.ada2i" in text and "train" in text and "widths" in text
    made = Corpus.load("mine.ada2i")
    assert made.name == "mine" and made.widths == corpus.widths and (made.labels == corpus.labels).all()
    assert main(["prepare", "meld.npz", "--task", "other", "--modalities", "ta"]) == 0
    assert sorted(Corpus.load("meld.ada2i").widths) == ["a", "t"]
    assert "dev_split" in fails(capsys, "prepare", "synthetic", "--dev-split", "none", "-o", "x.ada2i")
    assert "cannot be read" in fails(capsys, "prepare", "nothing.pkl", "-o", "x.ada2i")
    assert "argument --task: invalid choice: 'x'" in fails(capsys, "prepare", "meld.npz", "--task", "x")
    assert not (here / "x.ada2i").exists()


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in ("ada2i_fast", "python", "torch", "numpy", "triton", "scikit-learn", "cpu", "cuda", "backend"):
        assert f"\n{name}" in "\n" + text


def test_bench_says_where_the_benchmarks_are(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages/ada2i_fast/cli.py"))
    assert "part of the source checkout" in fails(capsys, "bench")
    (tmp_path / "site-packages/benchmarks").mkdir(parents=True)
    called = []
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: called.append((command, cwd)) or 5)
    assert main(["bench", "--", "-k", "ring"]) == 5
    assert called[0][0][1:] == ["-m", "pytest", str(tmp_path / "site-packages/benchmarks"), "--benchmark-only", "-k", "ring"]


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "predict", "bench", "info"])
def test_help(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: ada2i-fast {command}" in text and "example" in text and f"  ada2i-fast {command}" in text
    assert main(["--help"]) == 0 and f"  {command} " in capsys.readouterr().out


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "ada2i_fast.cli", "train", "--alpa", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ada2i-fast: error: unknown option '--alpa'; did you mean --alpha? (see ada2i-fast train --help)\n"


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, sentence", [
    (["--alpa", "1"], "unknown option '--alpa'; did you mean --alpha?"),
    (["--alpha"], "argument --alpha: expected one argument"),
    (["--set", "alpa=1"], "--set: unknown option 'alpa'; did you mean alpha?"),
    (["--set", "alpha"], "--set: expected name=value, got 'alpha'"),
    (["--set", "num_classes=3"], "--set num_classes: this comes from the corpus"),
    (["--preset", "best"], "preset: expected released or published, got 'best'"),
    (["--dataset", "imdb"], "dataset: expected one of iemocap"),
    (["--alpha", "high"], "alpha: expected a finite number, got 'high'"),
    (["--alpha", "nan"], "alpha: expected a finite number, got nan"),
    (["--epochs", "1.5"], "epochs: expected an integer, got '1.5'"),
    (["--batch-size", "0"], "batch_size: expected a value of at least 1, got 0"),
    (["--encoder", "gru"], "encoder: expected one of transformer, lstm; got 'gru'"),
    (["--encoder-heads", "six"], "encoder_heads: expected something like"),
    (["--encoder-heads", "t=3"], "encoder_heads: expected a divisor of the width 10"),
    (["--modalities", "tx"], "modalities: corpus talk has t, a, v, not 'x'"),
    (["--modalities", "tt"], "modalities: expected each name once"),
    (["--modalities", ""], "modalities: expected one or more names"),
    (["--seeds", "0"], "seeds: expected a number of seeds"),
    (["--seeds", "1,1"], "seeds: expected a number of seeds"),
    (["--seeds", "many"], "seeds: expected a number of seeds"),
    (["--seed", "-1"], "seed: expected a value of at least 0"),
    (["--device", "tpu"], "device: expected auto, cpu, cuda or cuda:<number>, got 'tpu'"),
    (["--device", "cuda:99"], "device cuda:99 is not available"),
    (["--backend", "fortran"], "backend: expected 'auto' or one of"),
    (["--threads", "0"], "--threads: expected at least 1"),
    (["--checkpoint-every", "0"], "--checkpoint-every: expected at least 1"),
    (["--config", "none.toml"], "none.toml cannot be read: No such file or directory"),
    (["--config", "bad.toml"], "bad.toml is not valid TOML"),
    (["--config", "talk.ada2i"], "talk.ada2i is not valid TOML"),
    (["--config", "unknown.toml"], "unknown.toml: unknown option 'alhpa'; did you mean alpha"),
    (["--config", "type.toml"], "alpha: expected a finite number, got [1]"),
    (["--config", "corpus.toml"], "corpus.toml: corpus: expected a string, got 3"),
    (["--corpus", "none.ada2i"], "none.ada2i cannot be read: No such file or directory"),
    (["--corpus", "cut.ada2i"], "cut.ada2i is truncated"),
    (["--corpus", "bad.toml"], "bad.toml"),
    (["--corpus", "nan.ada2i"], "conversation 'conversation0001', utterance 1: feature 4 of modality 'a' is nan"),
    (["--corpus", "blind.ada2i"], "corpus talk has no labels to train on"),
    (["--corpus", "nodev.ada2i"], "has no development conversations; choose --dev-split random_tenth"),
    (["-o", "full"], "full is not empty; choose another --output"),
    (["-o", "talk.ada2i"], "talk.ada2i cannot be written: File exists"),
    (["-o", "talk.ada2i/run"], "talk.ada2i/run cannot be written: Not a directory"),
    (["--resume", "full"], "full is not the directory of a run"),
    (["--resume", "full", "--alpha", "1", "--seeds", "3"], "--resume takes everything from full; leave out --seeds, --alpha"),
    (["extra"], "unknown argument 'extra'"),
])
def test_bad_train(here, corpus, capsys, argv, sentence):
    (here / "bad.toml").write_text("alpha = = 1\n")
    (here / "unknown.toml").write_text("alhpa = 1\n")
    (here / "type.toml").write_text("alpha = [1]\n")
    (here / "corpus.toml").write_text("corpus = 3\n")
    (here / "cut.ada2i").write_bytes((here / "talk.ada2i").read_bytes()[:-100])
    (here / "full").mkdir()
    (here / "full/x").write_text("")
    row = int(corpus.offsets[1]) + 1
    raw = bytearray((here / "talk.ada2i").read_bytes())
    place = raw.find(corpus.features["a"][row, 4:].tobytes())
    raw[place:place + 4] = struct.pack("<f", float("nan"))
    import hashlib
    raw[32:64] = hashlib.blake2b(bytes(raw[:32] + raw[64:]), digest_size=32).digest()
    (here / "nan.ada2i").write_bytes(raw)
    replace(corpus, labels=None).save(here / "blind.ada2i")
    replace(corpus, split=["" if s == "dev" else s for s in corpus.split]).save(here / "nodev.ada2i")
    before = sorted(str(p) for p in here.rglob("*"))
    where = [] if "--corpus" in argv or "corpus.toml" in argv else ["--corpus", "talk.ada2i"]
    said = fails(capsys, "train", "--quiet", "--no-tensorboard", *([] if "--device" in argv else ["--device", "cpu"]), *where, *argv)
    assert sentence in said
    assert sorted(str(p) for p in here.rglob("*")) == before


def test_bad_checkpoints_and_corpora(trained, here, corpus, capsys):
    run = trained / "run"
    (here / "text.pt").write_text("hello")
    (here / "cut.pt").write_bytes((run / "seed-12/best.pt").read_bytes()[:-500])
    wide = synthetic_corpus(3, 20, widths={"t": 11, "a": 8, "v": 9}, name="wide")
    wide.save("wide.ada2i")
    replace(corpus, features={"t": corpus.features["t"]}, name="mute").save("mute.ada2i")
    replace(corpus, class_names=[f"x{i}" for i in range(6)], name="other").save("other.ada2i")
    replace(corpus, labels=None, name="blind").save("blind.ada2i")
    replace(corpus, split=["train"] * 20, name="trainonly").save("trainonly.ada2i")
    before = sorted(os.listdir(here))
    for command in ("evaluate", "predict"):
        for argv, sentence in [
            (["none.pt", "--corpus", "talk.ada2i"], "none.pt cannot be read: No such file"),
            (["text.pt", "--corpus", "talk.ada2i"], "text.pt is not a checkpoint of ada2i_fast"),
            (["cut.pt", "--corpus", "talk.ada2i"], "cut.pt is truncated"),
            (["talk.ada2i", "--corpus", "talk.ada2i"], "talk.ada2i is not a checkpoint"),
            ([here, "--corpus", "talk.ada2i"], "has no checkpoint: expected best.pt"),
            ([run, "--corpus", "none.ada2i"], "none.ada2i cannot be read"),
            ([run, "--corpus", "wide.ada2i"], "was trained with 10 features of modality 't', corpus wide has 11"),
            ([run, "--corpus", "mute.ada2i"], "was trained with modality 'a', corpus mute has t"),
            ([run, "--corpus", "trainonly.ada2i", "--split", "test"], "has no test conversations; choose another --split"),
            ([run, "--corpus", "talk.ada2i", "--device", "cuda:99"], "device cuda:99 is not available"),
            ([run, "--corpus", "talk.ada2i", "-o", "talk.ada2i/x"], "talk.ada2i/x cannot be written: Not a directory"),
        ]:
            assert sentence in fails(capsys, command, *argv)
    assert "was trained with classes calm" in fails(capsys, "evaluate", run, "--corpus", "other.ada2i")
    assert "has no labels; ada2i-fast predict" in fails(capsys, "evaluate", run, "--corpus", "blind.ada2i")
    assert "the following arguments are required: --corpus" in fails(capsys, "predict", run)
    assert sorted(os.listdir(here)) == before


def test_resume_of_another_configuration(trained, tmp_path, capsys):
    import shutil

    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run/seed-15/result.json").unlink()
    text = (tmp_path / "run/config.toml").read_text()
    (tmp_path / "run/config.toml").write_text(text.replace("alpha = 0.1", "alpha = 0.3"))
    assert "seed-15/checkpoint.pt is of another configuration: alpha is 0.1 there and 0.3 here" in fails(
        capsys, "train", "--resume", tmp_path / "run", "-q", "--device", "cpu")
    (tmp_path / "run/config.toml").write_text(text)
    (tmp_path / "run/seed-15/checkpoint.pt").write_bytes(b"PK\x03\x04")
    assert "checkpoint.pt is truncated" in fails(capsys, "train", "--resume", tmp_path / "run", "-q", "--device", "cpu")


@pytest.mark.parametrize("module, argv, sentence", [
    ("sklearn", ["train", "--corpus", "talk.ada2i"], "training needs scikit-learn"),
    ("sklearn", ["evaluate", "run"], "evaluation needs scikit-learn"),
    ("matplotlib", ["evaluate", "run"], "the picture of the confusion matrix needs matplotlib")])
def test_missing_packages(here, monkeypatch, capsys, module, argv, sentence):
    monkeypatch.setitem(sys.modules, module, None)
    said = fails(capsys, *argv)
    assert said == f'{sentence}, which is not installed: pip install "ada2i_fast[train]"'
    assert os.listdir(here) == ["talk.ada2i"]


def test_out_of_memory_is_a_sentence(here, monkeypatch, capsys):
    def fit(*args, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("ada2i_fast.training.fit", fit)
    assert "out of memory; try a smaller --batch-size" in fails(capsys, "train", "--corpus", "talk.ada2i", "-o", "run", "--device", "cpu")


def test_a_bug_is_not_hidden(here, monkeypatch):
    def fit(*args, **options):
        raise RuntimeError("index out of range")

    monkeypatch.setattr("ada2i_fast.training.fit", fit)
    with pytest.raises(RuntimeError, match="index out of range"):
        main(["train", "--corpus", "talk.ada2i", "-o", "run", "--device", "cpu"])
