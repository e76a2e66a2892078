"""The command `ada2i-fast`: prepare, train, evaluate, predict, bench, info (docs/command.md)."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import difflib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Mapping, Sequence

from .config import _CHOICES, _DATASETS, Ada2IConfig
from .data import CorpusError, open_corpus
from .data.readers import DEV_SPLITS, KINDS, TEXT_LAYERS
from .training.files import RunError

__all__ = ["main"]

# -- options of the method and of training, generated from Ada2IConfig -------------------------------------------------

_FROM_CORPUS = ("input_widths", "num_classes")
_HELP = {
    "modalities": 'which to use, in which order: "tav", "a,t"; default: all that the corpus has',
    "hidden_dim": "width D of the encoders' output",
    "tensor_rank": "rank R of the tensor ring",
    "encoder": "unimodal encoder",
    "encoder_layers": "layers of an encoder",
    "encoder_heads": 'attention heads, e.g. "t=6,a=8"; none: the first of 5..14 that divides the width',
    "feedforward_dim": "inner width of the transformer encoders",
    "afw": "attention-based feature weighting",
    "afw_layers": "layers of feature weighting",
    "amw": "cosine fusion; without it a linear map of the concatenation",
    "beta": "weight of the residual gate of feature weighting (eq. 7)",
    "dropout": "dropout probability",
    "padding": "whether padded rows take part (released) or are masked",
    "attention_scale": "factor of the cores; none: 1/sqrt(tensor_rank) (eq. 4)",
    "ring_order": "order in which the other modalities are contracted",
    "feature_target": "what the attention mapping network is compared with (eq. 12)",
    "feature_reduction": "how the feature loss sums over modalities",
    "cosine_norm": "weights of unit norm over classes (released) or features (eq. 8)",
    "cosine_scale": "temperature of the cosines",
    "cosine_bias": "a bias in every modality's logits",
    "head": "classifier after the fusion (eq. 9)",
    "head_expansion": "inner width of the classifier, in classes",
    "score_from": "where the disparity scores come from",
    "noise": "where modulation adds its noise",
    "clip_order": "clip gradients before or after modulation",
    "dev_split": "the corpus's own development split, or a new cut of its training conversations",
    "modulation": "modulate the encoders' gradients by the disparity ratio",
    "modulation_start": "first epoch with modulation",
    "modulation_end": "last epoch with modulation",
    "alpha": "strength of modulation",
    "learning_rate": "of Adam",
    "weight_decay": "of Adam",
    "clip_norm": "largest gradient norm; 0: no clipping",
    "clip_norm_type": "which norm is clipped",
    "batch_size": "conversations per batch",
    "epochs": "most epochs to train",
    "early_stopping": "stop after this many epochs without a better dev W-F1",
    "scheduler_factor": "learning rate times this on a plateau of the dev loss",
    "scheduler_patience": "epochs on a plateau before that",
    "seed": "first random seed",
}
_FILE_KEYS = ("preset", "dataset", "corpus", "seeds", "precision")


def _fields() -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(Ada2IConfig) if f.name not in _FROM_CORPUS]


def _value(name: str, text: Any) -> Any:
    """An option's value from the command line or TOML; what is wrong with it is Ada2IConfig's to say."""
    if not isinstance(text, str):
        return text
    kind = next(f.type for f in dataclasses.fields(Ada2IConfig) if f.name == name)
    if name == "modalities":
        return tuple(m.strip() for m in text.split(",")) if "," in text else tuple(text.strip())
    if name in ("encoder_heads", "attention_scale") and text == "none":
        return None
    if name == "encoder_heads":
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(m and heads.isdigit() for m, _, heads in pairs):
            raise RunError(f'encoder_heads: expected something like "t=6,a=8" or none, got {text!r}')
        return {m.strip(): int(heads) for m, _, heads in pairs}
    if kind == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    for convert in {"int": (int,), "float": (int, float), "float | None": (int, float)}.get(kind, ()):
        try:
            return convert(text)
        except ValueError:
            pass
    return text


def _seeds(value: Any, first: int) -> list[int]:
    """`--seeds 3` (three, from `first` on) or `--seeds 12,13,14`."""
    try:
        if isinstance(value, str) and "," in value:
            value = [int(part) for part in value.split(",") if part.strip()]
        elif isinstance(value, str):
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return list(range(first, first + value))
        if isinstance(value, list) and value and all(type(s) is int and s >= 0 for s in value) and len(set(value)) == len(value):
            return value
    except ValueError:
        pass
    raise RunError(f"seeds: expected a number of seeds of at least 1, or distinct seeds such as 12,13,14; got {value!r}")


def _dataset_of(corpus) -> str | None:
    """Which of the known data sets a corpus is, by its name and number of classes."""
    name = "".join(c for c in corpus.name.lower() if c.isalnum())
    for known in ("iemocap", "meld", "mosei", "mosi", "synthetic"):
        if name.startswith(known):
            exact = {("iemocap", 4): "iemocap4", ("mosei", 2): "mosei2", ("mosei", 7): "mosei7"}
            found = exact.get((known, corpus.num_classes), known)
            return found if found in _DATASETS else None
    return None


def _config(corpus, preset: str, dataset: str | None, options: Mapping[str, Any], say=None) -> Ada2IConfig:
    """The preset with the options over it; widths and classes from the corpus."""
    dataset = dataset or _dataset_of(corpus)
    if dataset is None:
        dataset = "synthetic"
        if say:
            say(f'note: corpus {corpus.name} is not a known data set: sizes and rates of "synthetic" (--dataset chooses others)')
    options = {name: value for name, value in options.items() if name not in _FROM_CORPUS}
    if "modalities" in options:
        chosen = options["modalities"]
        for m in chosen if isinstance(chosen, (tuple, list)) else ():
            if m not in corpus.widths:
                raise RunError(f"modalities: corpus {corpus.name} has {', '.join(corpus.modalities)}, not {m!r}")
    else:
        options["modalities"] = tuple(m for m in Ada2IConfig().modalities if m in corpus.widths)
    try:
        return Ada2IConfig.preset(preset, dataset, **options, input_widths=corpus.widths, num_classes=corpus.num_classes)
    except (ValueError, TypeError) as error:
        raise RunError(str(error)) from None


def _read_config(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """A TOML file as (options of Ada2IConfig, preset, dataset, corpus and seeds)."""
    from .training.files import read_toml

    known = [f.name for f in dataclasses.fields(Ada2IConfig)]
    options, rest = {}, {}
    for name, value in read_toml(path).items():
        if name in _FILE_KEYS:
            rest[name] = value
        elif name in known:
            options[name] = _value(name, value)
        else:
            raise RunError(f"{path}: unknown option {name!r}{_near(name, [*known, *_FILE_KEYS])}")
    for name in ("preset", "dataset", "corpus", "precision"):
        if not isinstance(rest.get(name, ""), str):
            raise RunError(f"{path}: {name}: expected a string, got {rest[name]!r}")
    return options, rest


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 2, 0.7)
    return f"; did you mean {' or '.join(near)}?" if near else ""


# -- commands ----------------------------------------------------------------------------------------------------------

_TASKS = {"auto": {}, "iemocap": dict(dataset="iemocap", num_classes=6), "iemocap4": dict(dataset="iemocap", num_classes=4),
          "meld": dict(dataset="meld"), "mosei2": dict(dataset="mosei", num_classes=2), "mosei7": dict(dataset="mosei", num_classes=7),
          "mosi2": dict(dataset="mosi", num_classes=2), "mosi7": dict(dataset="mosi", num_classes=7), "other": dict(dataset="other")}


def _prepare(args) -> int:
    options = dict(_TASKS[args.task])
    for name in ("kind", "dev_split", "seed", "modalities", "text_file", "text_layer", "labels", "neutral", "name"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if "modalities" in options:
        options["modalities"] = _value("modalities", options["modalities"])
    if options.get("text_layer", "").isdigit():
        options["text_layer"] = int(options["text_layer"])
    corpus = open_corpus(args.source, **options)
    output = args.output or f"{Path(args.source).stem}.ada2i"
    corpus.save(output)
    print(corpus.describe())
    print(f"saved to {output}")
    return 0


def _train(args) -> int:
    from .training import PRECISIONS, fit, resolve_device
    from .training.files import write_toml
    from .training.logs import results_table

    device = resolve_device(args.device)
    _threads(args.threads)
    if args.checkpoint_every < 1:
        raise RunError(f"--checkpoint-every: expected at least 1, got {args.checkpoint_every}")
    flags = {f.name: _value(f.name, getattr(args, f.name)) for f in _fields() if getattr(args, f.name) is not None}
    for pair in args.set or []:
        name, equals, text = pair.partition("=")
        if not equals:
            raise RunError(f"--set: expected name=value, got {pair!r}")
        name = name.strip().replace("-", "_")
        known = [f.name for f in _fields()]
        if name in _FROM_CORPUS:
            raise RunError(f"--set {name}: this comes from the corpus")
        if name not in known:
            raise RunError(f"--set: unknown option {name!r}{_near(name, known)}")
        flags.setdefault(name, _value(name, text.strip()))

    if args.resume is not None:
        given = [f"--{name.replace('_', '-')}" for name in ("preset", "dataset", "config", "seeds", "output", "precision")
                 if getattr(args, name) is not None]
        given += [f"--{name.replace('_', '-')}" for name in flags]
        if given:
            raise RunError(f"--resume takes everything from {args.resume}; leave out {', '.join(given)}")
        output = args.resume
        path = os.path.join(output, "config.toml")
        if not os.path.isfile(path):
            raise RunError(f"{output} is not the directory of a run: it has no config.toml")
        file_options, file = _read_config(path)
    else:
        file_options, file = _read_config(args.config) if args.config is not None else ({}, {})

    where = args.corpus or file.get("corpus") or "synthetic"
    corpus = open_corpus(where)
    preset = args.preset or file.get("preset") or "published"
    config = _config(corpus, preset, args.dataset or file.get("dataset"), {**file_options, **flags}, _note)
    seeds = _seeds(args.seeds if args.seeds is not None else file.get("seeds", 1), config.seed)
    precision = args.precision or file.get("precision") or "float32"
    if precision not in PRECISIONS:
        raise RunError(f"precision: expected {' or '.join(PRECISIONS)}, got {precision!r}")
    path = where if where == "synthetic" else os.path.abspath(where)
    if device.type == "cpu":
        _keep_freed_memory()

    if args.resume is None:
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in corpus.name)
        output = args.output or os.path.join("runs", f"{name}-{preset}-{time.strftime('%Y%m%d-%H%M%S')}")
        if os.path.isdir(output) and os.listdir(output):
            raise RunError(f"{output} is not empty; choose another --output, or continue the run in it with --resume {output}")
        _ready(corpus, config, seeds)
        _serves(args.backend, config, device)
        try:
            os.makedirs(output, exist_ok=True)
        except OSError as error:
            raise RunError(f"{output} cannot be written: {error.strerror or error}") from None
        values = {"preset": preset, "corpus": path, "seeds": seeds, "precision": precision, **config.replace(seed=seeds[0]).to_dict()}
        if args.dataset or file.get("dataset"):
            values["dataset"] = args.dataset or file["dataset"]
        write_toml(os.path.join(output, "config.toml"), values,
                   "Effective configuration of a run: ada2i-fast train --config FILE repeats it.\n"
                   "input_widths and num_classes are for information: training takes them from the corpus.")
    print(f"{corpus.name}: {corpus.num_conversations} conversations, {corpus.num_utterances} utterances, {corpus.num_classes} classes; "
          f"modalities {', '.join(f'{m} ({corpus.widths[m]})' for m in config.modalities)}")
    print(f"preset {preset}, device {device}, {config.epochs} epochs at most, in {output}")
    bar = sys.stderr.isatty() and not args.quiet
    try:
        found = fit(corpus, config, output, seeds=seeds, resume=args.resume is not None, device=device, backend=args.backend,
                    tensorboard=args.tensorboard, checkpoint_every=args.checkpoint_every, corpus_path=path,
                    say=(lambda line: None) if args.quiet else _say, bar=bar, graphs=args.graph,
                    precision=precision)
    except KeyboardInterrupt:
        print(f"ada2i-fast: interrupted; continue with: ada2i-fast train --resume {output}", file=sys.stderr)
        return 130
    print()
    print(results_table(found))
    print(f"saved to {output}: results.csv, results.json, config.toml, and per seed best.pt, checkpoint.pt, epochs.csv, result.json")
    return 0


def _keep_freed_memory() -> None:
    """Has glibc keep what is freed. Large blocks, such as all gradients of a step, otherwise go back to the system, and the next step
    faults them in again page by page: some 5 to 10 % of a step. Settings of the user's own (MALLOC_...) go first."""
    if not sys.platform.startswith("linux") or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:                                      # another C library
        return
    for parameter, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 1 << 26)):        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(parameter, value)


def _ready(corpus, config: Ada2IConfig, seeds: Sequence[int]) -> None:
    """What can be known to fail is said before a directory is made."""
    from .training import split
    from .training.files import need

    need("sklearn", "training")
    if corpus.labels is None:
        raise RunError(f"corpus {corpus.name} has no labels to train on")
    for seed in seeds:
        split(corpus, config.replace(seed=seed))


def _serves(backend: str, config: Ada2IConfig, device) -> None:
    """Asks for the backend before anything runs: one that cannot serve this model here is an error of the command line."""
    import torch

    from . import backends

    x = [torch.empty(0, config.hidden_dim, device=device) for _ in config.modalities]
    try:
        for op in ("tensor_ring", "attention_mapping"):
            backends.choose(op, x, backend, config.tensor_rank)
    except (ValueError, RuntimeError) as error:
        raise RunError(str(error)) from None


def _checkpoint(where: str) -> str:
    """The checkpoint file meant by a file, a seed's directory, or a run's (there the seed of the best dev W-F1)."""
    from .training.files import read_json

    if not os.path.isdir(where):
        return where
    if os.path.isfile(os.path.join(where, "best.pt")):
        return os.path.join(where, "best.pt")
    found = sorted(Path(where).glob("seed-*/best.pt"))
    if not found:
        raise RunError(f"{where} has no checkpoint: expected best.pt or seed-*/best.pt in it")
    done = {path: read_json(path.with_name("result.json")).get("dev_weighted_f1", 0) for path in found
            if path.with_name("result.json").exists()}
    return str(max(done, key=done.get) if done else found[0])


def _open_model(args):
    """(checkpoint path, its values, its model, its corpus or another one)."""
    from .training import load, model_of, resolve_device

    device = resolve_device(args.device)
    _threads(args.threads)
    path = _checkpoint(args.checkpoint)
    values = load(path)
    where = args.corpus or values["corpus"]["path"]
    if where is None:
        raise RunError(f"{path} does not say where its corpus was; give it with --corpus")
    corpus = open_corpus(where)
    model = model_of(values, path, args.backend).to(device)
    _serves(args.backend, model.config, device)
    return path, values, model, corpus, device


def _evaluate(args) -> int:
    from .training import batches, evaluate, report, split
    from .training.checkpoint import check_corpus
    from .training.files import atomic, need, write_json
    from .training.metrics import confusion

    need("sklearn", "evaluation")
    need("matplotlib", "the picture of the confusion matrix")
    path, values, model, corpus, device = _open_model(args)
    check_corpus(values, corpus, path, labels=True)
    if corpus.labels is None:
        raise RunError(f"corpus {corpus.name} has no labels; ada2i-fast predict works without them")
    if args.split == "all":
        chosen = corpus.conversations().tolist()
    elif args.split == "test":
        chosen = corpus.conversations("test").tolist()
    else:
        chosen = split(corpus, model.config)[args.split == "dev"]
    if not chosen:
        raise RunError(f"corpus {corpus.name} has no {args.split} conversations; choose another --split")
    output = args.output or os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        raise RunError(f"{output} cannot be written: {error.strerror or error}") from None

    found = evaluate(model, list(batches(corpus, chosen, model.config)), device)
    names = corpus.class_names
    matrix = confusion(found.labels, found.classes, len(names))
    scores = found.scores(names)
    text = report(found.labels, found.classes, names)
    files = [os.path.join(output, f"report-{args.split}.json"), os.path.join(output, f"confusion-{args.split}.png")]
    write_json(files[0], {"checkpoint": path, "corpus": corpus.name, "split": args.split, "scores": scores,
                          "report": report(found.labels, found.classes, names, as_dict=True), "confusion": matrix.tolist(),
                          "class_names": names})
    picture = _picture(matrix, names, f"{corpus.name}, {args.split}: W-F1 {100 * scores['weighted_f1']:.2f}")
    with atomic(files[1]) as file:
        file.write(picture)
    print(f"{path} (epoch {values['epoch']}), corpus {corpus.name}, {args.split}: {len(found.labels)} utterances")
    print(text)
    for m, alone in scores["unimodal"].items():
        print(f"{m} alone: W-F1 {100 * alone['weighted_f1']:.2f}, accuracy {100 * alone['accuracy']:.2f}")
    print(f"saved to {files[0]} and {files[1]}")
    return 0


def _picture(matrix, names: Sequence[str], title: str) -> bytes:
    """A confusion matrix as PNG: counts, shaded by the share of the true class."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(names)
    share = matrix / matrix.sum(1, keepdims=True).clip(1)
    figure = Figure(figsize=(2.5 + 0.7 * count, 2 + 0.6 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xticks=range(count), yticks=range(count), xlabel="predicted", ylabel="true", title=title, yticklabels=names)
    axes.set_xticklabels(names, rotation=45, ha="right")
    for i in range(count):
        for j in range(count):
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", color="white" if share[i, j] > 0.5 else "black")
    figure.colorbar(image, label="share of the true class")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _predict(args) -> int:
    from .training import batches, evaluate
    from .training.checkpoint import check_corpus
    from .training.files import atomic

    path, values, model, corpus, device = _open_model(args)
    check_corpus(values, corpus, path, labels=False)
    chosen = corpus.conversations(None if args.split == "all" else args.split).tolist()
    if not chosen:
        raise RunError(f"corpus {corpus.name} has no {args.split} conversations; choose another --split")
    found = evaluate(model, list(batches(corpus, chosen, model.config)), device)
    names, probability, row = values["corpus"]["class_names"], found.log_prob.exp().tolist(), 0
    lines = []
    for c in chosen:
        for index, place in enumerate(range(int(corpus.offsets[c]), int(corpus.offsets[c + 1]))):
            line = {"conversation": corpus.conversation_ids[c], "index": index,
                    "utterance": str(index) if corpus.utterance_ids is None else corpus.utterance_ids[place],
                    "label": names[int(found.classes[row])], "probabilities": dict(zip(names, probability[row]))}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            row += 1
    if args.output is None:
        sys.stdout.writelines(lines)
        return 0
    with atomic(args.output) as file:
        file.writelines(line.encode() for line in lines)
    print(f"{len(lines)} predictions in {len(chosen)} conversations saved to {args.output}", file=sys.stderr)
    return 0


def _bench(args) -> int:
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if not folder.is_dir():
        raise RunError("the benchmarks are part of the source checkout and not of an installed package; run this in a clone with pip install -e")
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("pytest_benchmark") is None:
        raise RunError('benchmarks need pytest-benchmark, which is not installed: pip install "ada2i_fast[bench]"')
    return subprocess.call([sys.executable, "-m", "pytest", str(folder), "--benchmark-only", *args.arguments], cwd=folder.parent)


def _info(args) -> int:
    from importlib import metadata

    import numpy
    import torch

    from . import __version__, backends

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    rows = {"ada2i_fast": __version__, "python": platform.python_version(), "platform": platform.platform(),
            "torch": torch.__version__, "numpy": numpy.__version__, "triton": version("triton")}
    rows |= {package: version(package) for package in ("scikit-learn", "matplotlib", "tqdm", "tensorboard")}
    rows["cpu"] = f"{_cpu()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    try:
        if torch.cuda.is_available():
            rows["cuda"] = f"{torch.version.cuda}: " + "; ".join(
                f"{torch.cuda.get_device_name(i)} (compute capability {'.'.join(map(str, torch.cuda.get_device_capability(i)))})"
                for i in range(torch.cuda.device_count()))
        else:
            rows["cuda"] = "not available" + ("" if torch.version.cuda else " (PyTorch is built without it)")
    except RuntimeError as error:
        rows["cuda"] = f"not usable: {str(error).splitlines()[0]}"
    rows |= backends.info()
    width = max(map(len, rows))
    for name, value in rows.items():
        first, *more = str(value).splitlines() or [""]
        print(f"{name.ljust(width)}  {first}")
        for line in more:
            print(f"{' ' * width}  {line}")
    return 0


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _threads(count: int | None) -> None:
    if count is None:
        return
    import torch

    if count < 1:
        raise RunError(f"--threads: expected at least 1, got {count}")
    torch.set_num_threads(count)


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _say(line: str) -> None:
    print(line, flush=True)


# -- the command line --------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """One sentence per error, with the nearest known option."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str):
        raise RunError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            name = unknown[0].split("=")[0]
            what = "option" if name.startswith("-") else "argument"
            self.error(f"unknown {what} {name!r}{_near(name, known)}")
        return namespace, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ada2i-fast", description="Ada2I: balanced multimodal emotion recognition in conversations.", epilog=(
        "examples:\n"
        "  ada2i-fast train                                  the embedded synthetic corpus, in about a minute\n"
        "  ada2i-fast prepare meld.pkl -o meld.ada2i         features of the field -> one checked file\n"
        "  ada2i-fast train --corpus meld.ada2i --seeds 3    mean and standard deviation over three seeds\n"
        "  ada2i-fast evaluate runs/RUN                      classification report and confusion matrix\n"
        "  ada2i-fast predict runs/RUN --corpus new.ada2i    JSON lines with probabilities\n\n"
        "ada2i-fast COMMAND --help explains a command."))
    parser.add_argument("--version", action="store_true", help="print the version and end")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run, summary: str, epilog: str):
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=epilog)
        sub.set_defaults(run=run)
        return sub

    p = command("prepare", _prepare, "turn a feature file of the field into a corpus file", (
        "SOURCE may be a pickle of the released Ada2I, of the DialogueRNN / MMGCN / M3NET family or of COGMEN / CORECT, or an .npz\n"
        "file; pickles are read without executing anything in them. The corpus file is checked on every load.\n\n"
        "examples:\n"
        "  ada2i-fast prepare IEMOCAP_features.pkl -o iemocap.ada2i\n"
        "  ada2i-fast prepare iemocap.pkl --task iemocap4 --dev-split first_tenth -o iemocap4.ada2i\n"
        "  ada2i-fast prepare mosei_data.pkl --task mosei2 -o mosei2.ada2i"))
    p.add_argument("source", metavar="SOURCE", help="the feature file")
    p.add_argument("-o", "--output", metavar="FILE", help="the corpus file (default: SOURCE's name with .ada2i, in this directory)")
    p.add_argument("--kind", choices=KINDS, help="layout of SOURCE (default: by its contents)")
    p.add_argument("--task", choices=tuple(_TASKS), default="auto", help="data set and classes (default: by its contents)")
    p.add_argument("--dev-split", choices=DEV_SPLITS, help="development conversations: the official ones, a tenth of the training, or none")
    p.add_argument("--seed", type=int, metavar="N", help="of random_tenth (default 12)")
    p.add_argument("--modalities", metavar="TAV", help='which to read, e.g. "ta" (default: all)')
    p.add_argument("--text-file", metavar="FILE", help="a RoBERTa pickle whose vectors replace the text features")
    p.add_argument("--text-layer", metavar="LAYER", choices=tuple(map(str, TEXT_LAYERS)), help="of its four vectors: mean, concat, 1, 2, 3 or 4")
    p.add_argument("--labels", choices=("auto", "score", "class"), help="of MOSEI and MOSI: sentiment scores or classes")
    p.add_argument("--neutral", choices=("positive", "drop"), help="of two-class sentiment: what a score of 0 is")
    p.add_argument("--name", help="name of the corpus")

    p = command("train", _train, "train, and test the best state", (
        "A preset gives every option a value; a --config file overrides the preset, options on the command line override both.\n"
        "Widths and classes come from the corpus. The run's directory receives config.toml (what was used; --config reads it\n"
        "again), results.csv and results.json, and per seed best.pt, checkpoint.pt, epochs.csv and result.json.\n\n"
        "examples:\n"
        "  ada2i-fast train\n"
        "  ada2i-fast train --corpus meld.ada2i --preset released --seeds 12,13,14 --output runs/meld\n"
        "  ada2i-fast train --corpus iemocap.ada2i --modalities ta --alpha 0.05 --no-amw\n"
        "  ada2i-fast train --config tuned.toml --epochs 20\n"
        "  ada2i-fast train --resume runs/meld"))
    p.add_argument("--corpus", metavar="FILE", help="corpus file, or a feature file that prepare understands (default: the synthetic corpus)")
    p.add_argument("--preset", metavar="NAME", help="published (the paper; default) or released (the authors' code)")
    p.add_argument("--dataset", metavar="NAME", help=f"whose sizes and rates the preset takes (default: by the corpus's name): {', '.join(_DATASETS)}")
    p.add_argument("--config", metavar="FILE", help="TOML file: options below with _ for -, and preset, dataset, corpus, seeds")
    p.add_argument("--set", action="append", metavar="NAME=VALUE", help="an option below by its name; may be repeated")
    p.add_argument("--seeds", metavar="N", help="number of seeds from --seed on, or a list such as 12,13,14 (default 1)")
    p.add_argument("-o", "--output", metavar="DIR", help="directory of the run (default: runs/CORPUS-PRESET-TIME)")
    p.add_argument("--resume", metavar="DIR", help="continue the interrupted run in DIR, to the same numbers")
    _machine(p)
    p.add_argument("--checkpoint-every", type=int, default=1, metavar="N", help="epochs between checkpoints for --resume (default 1)")
    p.add_argument("--precision", metavar="NAME", help="of the training steps: float32 (default), or bfloat16 by autocast")
    p.add_argument("--no-graph", dest="graph", action="store_false", help="on CUDA: ordinary training steps, no CUDA graphs")
    p.add_argument("--no-tensorboard", dest="tensorboard", action="store_false", help="no TensorBoard curves")
    p.add_argument("-q", "--quiet", action="store_true", help="only the results")
    group = p.add_argument_group("options of the method and of training", "The default is the preset's.")
    for f in _fields():
        flag = "--" + f.name.replace("_", "-")
        if f.type == "bool":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=_HELP[f.name])
        else:
            choices = f" ({', '.join(_CHOICES[f.name])})" if f.name in _CHOICES else ""
            metavar = "TAV" if f.name == "modalities" else "NAME" if f.name in _CHOICES else "X" if "float" in f.type else "N"
            group.add_argument(flag, metavar=metavar, help=(_HELP[f.name] + choices).replace("%", "%%"))

    p = command("evaluate", _evaluate, "classification report and confusion matrix of a trained model", (
        "CHECKPOINT may be a run's directory (its seed of the best dev W-F1), a seed's directory, or a .pt file. The corpus is the\n"
        "one that it was trained on unless --corpus names another.\n\n"
        "examples:\n"
        "  ada2i-fast evaluate runs/meld\n"
        "  ada2i-fast evaluate runs/meld/seed-13/best.pt --split dev -o reports"))
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="run, seed directory or checkpoint file")
    p.add_argument("--corpus", metavar="FILE", help="corpus with labels (default: the one it was trained on)")
    p.add_argument("--split", choices=("test", "dev", "train", "all"), default="test", help="which conversations (default test)")
    p.add_argument("-o", "--output", metavar="DIR", help="where report-SPLIT.json and confusion-SPLIT.png go (default: beside the checkpoint)")
    _machine(p)

    p = command("predict", _predict, "predict emotions, one JSON object per utterance", (
        "The corpus needs no labels. A line holds conversation, index (in the conversation, from 0), utterance (its id), label and\n"
        "probabilities by class.\n\n"
        "examples:\n"
        "  ada2i-fast predict runs/meld --corpus new.ada2i > predictions.jsonl\n"
        "  ada2i-fast predict runs/meld --corpus new.ada2i -o predictions.jsonl"))
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="run, seed directory or checkpoint file")
    p.add_argument("--corpus", metavar="FILE", required=True, help="corpus to predict on")
    p.add_argument("--split", choices=("all", "train", "dev", "test"), default="all", help="which conversations (default all)")
    p.add_argument("-o", "--output", metavar="FILE", help="file to write (default: standard output)")
    _machine(p)

    p = command("bench", _bench, "run the benchmarks of a source checkout", (
        "Further arguments behind -- go to pytest.\n\nexample:\n  ada2i-fast bench -- -k tensor_ring"))
    p.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="for pytest")

    command("info", _info, "versions, processor, devices and backends of this machine", "example:\n  ada2i-fast info")
    return parser


def _machine(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default auto: CUDA where there is a device)")
    p.add_argument("--backend", default="auto", metavar="NAME", help="implementation of the operators: auto, torch, cpu, triton, cuda (default auto)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, 2 for an error that the user can mend (one sentence on stderr), 130 if interrupted."""
    try:
        parser = _parser()
        try:
            args = parser.parse_args(argv)
        except SystemExit as end:                           # --help
            return int(end.code or 0)
        if args.version:
            from . import __version__

            print(f"ada2i-fast {__version__}")
            return 0
        if args.command is None:
            parser.print_help()
            return 0
        return args.run(args)
    except (RunError, CorpusError) as error:
        print(f"ada2i-fast: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():   # torch's for either device says so
            raise
        print("ada2i-fast: error: out of memory; try a smaller --batch-size or another --device", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ada2i-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:                                 # ada2i-fast predict ... | head
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
