"""The training loop: the released protocol, for one or several seeds, with resume."""

from __future__ import annotations

import contextlib
import math
import os
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Mapping, Sequence

import torch

from ..batch import DialogueBatch
from ..config import Ada2IConfig
from ..data.corpus import Corpus, tenth
from ..model import Ada2I
from ..optim import BalancedAdam
from . import checkpoint
from .graph import GraphedStep
from .files import RunError, need, read_json, write_csv, write_json
from .logs import Board, epoch_columns, results, write_results
from .metrics import evaluate

__all__ = ["PRECISIONS", "batches", "fit", "resolve_device", "split"]

PRECISIONS = ("float32", "bfloat16")


def resolve_device(name: str) -> torch.device:
    """"auto" is CUDA where there is a device, else the CPU. Raises RunError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(f"device: expected auto, cpu, cuda or cuda:<number>, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"device: expected auto, cpu, cuda or cuda:<number>, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise RunError(f"device {name} is not available: PyTorch {torch.__version__} sees {count} CUDA devices; use --device cpu")
    return device


def split(corpus: Corpus, config: Ada2IConfig) -> tuple[list[int], list[int], list[int], random.Random]:
    """Conversations to train, develop and test on, and the generator that goes on to shuffle the first.

    `config.dev_split`: "official" takes the corpus as it is split; "first_tenth" and "random_tenth" cut anew from its
    training and development conversations, in corpus order. As in the released code one generator, seeded with
    `config.seed`, makes the random cut and then every epoch's order, so that a seed gives the released batches.

    Raises RunError where a split is empty.
    """
    generator = random.Random(config.seed)
    train, dev, test = (corpus.conversations(name).tolist() for name in ("train", "dev", "test"))
    if config.dev_split != "official":
        pool = sorted(train + dev)
        if config.dev_split == "random_tenth":
            generator.shuffle(pool)
        train, dev = tenth(pool, "first_tenth", config.seed)
    for name, found in (("training", train), ("development", dev), ("test", test)):
        if not found:
            hint = "; choose --dev-split random_tenth" if name == "development" and len(train) > 1 else ""
            raise RunError(f"corpus {corpus.name} has no {name} conversations{hint}")
    return train, dev, test, generator


def batches(corpus: Corpus, conversations: Sequence[int], config: Ada2IConfig) -> Iterable:
    """`DialogueBatch`es of `config.batch_size` consecutive conversations, on the CPU."""
    for start in range(0, len(conversations), config.batch_size):
        yield corpus.batch(conversations[start:start + config.batch_size], modalities=config.modalities)


def ahead(found: Iterable[DialogueBatch], device: torch.device) -> Iterable[DialogueBatch]:
    """The batches on the device; on CUDA the next one is already on its way, on a stream of its own. On a CPU as they are."""
    if device.type != "cuda":
        yield from found
        return
    stream = torch.cuda.Stream(device)

    def send(batch: DialogueBatch) -> tuple[DialogueBatch, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return batch.pin_memory().to(device, non_blocking=True), stream.record_event()

    def arrived(batch: DialogueBatch, event: torch.cuda.Event) -> DialogueBatch:
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for t in (*batch.features.values(), batch.offsets, *(() if batch.labels is None else (batch.labels,))):
            t.record_stream(current)                        # its memory is not given away before `current` is through with it
        return batch

    waiting = None
    for batch in found:
        sent = send(batch)
        if waiting is not None:
            yield arrived(*waiting)
        waiting = sent
    if waiting is not None:
        yield arrived(*waiting)


def fit(corpus: Corpus, config: Ada2IConfig, output_dir: str | os.PathLike, *, seeds: Sequence[int] | None = None,
        resume: bool = False, device: str | torch.device = "cpu", backend: str = "auto", tensorboard: bool = True,
        checkpoint_every: int = 1, corpus_path: str | None = None, say: Callable[[str], None] | None = None,
        bar: bool = False, graphs: bool = True, precision: str = "float32") -> dict[str, Any]:
    """Trains once per seed, tests the state of the best development W-F1, and writes everything into `output_dir`.

    Per epoch, as in the released code: shuffle the training conversations (from the last order on), batches of consecutive
    ones, forward, L_main, backward, clip, modulation between `modulation_start` and `modulation_end`, Adam; then the
    development split: the sum of its batches' mean NLL drives ReduceLROnPlateau, a strictly better W-F1 makes the best state,
    and `early_stopping` epochs without one end the seed. A loss that is not finite ends it as well, with the best state so far.

    seeds: default [config.seed].  resume: goes on where a run in `output_dir` was interrupted, with the numbers that it would
    have had; finished seeds are read back.  device, backend: see `resolve_device` and `Ada2I`.  checkpoint_every: epochs
    between checkpoints for resuming.  corpus_path: remembered in the checkpoints.  say: receives lines of progress.
    bar: a progress bar per epoch on stderr.  graphs: on CUDA steps are CUDA graphs where they can be, see `GraphedStep`.
    precision: "bfloat16" puts the training steps under autocast; parameters, optimizer and evaluation stay float32.

    Files: seed-<n>/{checkpoint.pt, best.pt, epochs.csv, result.json}, tensorboard/, results.csv, results.json.

    Returns what results.json holds. Raises RunError (or the data's CorpusError) with one sentence for the user. The global
    random state of PyTorch is restored at the end.
    """
    seeds = [config.seed] if seeds is None else list(seeds)
    say = say or (lambda line: None)
    device = resolve_device(str(device))
    if not seeds or len(set(seeds)) != len(seeds):
        raise RunError(f"seeds: expected one or more distinct seeds, got {', '.join(map(str, seeds)) or 'none'}")
    if precision not in PRECISIONS:
        raise RunError(f"precision: expected {' or '.join(PRECISIONS)}, got {precision!r}")
    if corpus.labels is None:
        raise RunError(f"corpus {corpus.name} has no labels to train on")
    if corpus.num_classes != config.num_classes:
        raise RunError(f"num_classes: expected {corpus.num_classes}, the classes of corpus {corpus.name}, got {config.num_classes}")
    for m in config.modalities:
        if corpus.widths.get(m) != config.input_widths[m]:
            raise RunError(f"modality {m!r}: the configuration says {config.input_widths[m]} features, corpus {corpus.name} has "
                           f"{corpus.widths.get(m, 'none')}")
    need("sklearn.metrics", "training")
    if bar and not _importable("tqdm"):
        say('note: progress bars need tqdm, which is not installed: pip install "ada2i_fast[train]"')
        bar = False
    for seed in seeds:                                      # before anything is written
        split(corpus, config.replace(seed=seed))

    per_seed = []
    for number, seed in enumerate(seeds, 1):
        directory = os.path.join(output_dir, f"seed-{seed}")
        done = os.path.join(directory, "result.json")
        if resume and os.path.exists(done):
            per_seed.append(read_json(done))
            say(f"seed {seed}: finished before")
            continue
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError as error:
            raise RunError(f"{directory} cannot be written: {error.strerror or error}") from None
        say(f"seed {seed} ({number} of {len(seeds)})")
        with _own_random_state(device):
            run = _Run(corpus, config.replace(seed=seed), directory, device, backend, checkpoint_every, corpus_path, say, bar, graphs,
                       precision)
            board = os.path.join(output_dir, "tensorboard", f"seed-{seed}") if tensorboard else None
            per_seed.append(run.go(resume, board))
    found = results(per_seed)
    write_results(output_dir, found)
    return found


@dataclass
class _State:
    """Where a run stands after an epoch, the model's and optimizer's own state apart."""

    epoch: int = 0
    stale: int = 0                                          # epochs since the best one
    best_epoch: int = 0
    best_score: float = -1.0
    best_model: dict | None = None
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""


class _Run:
    """One seed."""

    def __init__(self, corpus, config, directory, device, backend, checkpoint_every, corpus_path, say, bar, graphs,
                 precision) -> None:
        self.corpus, self.config, self.directory, self.device = corpus, config, directory, device
        self.every, self.say, self.bar = checkpoint_every, say, bar
        self.about = checkpoint.describe(corpus, corpus_path)
        self.order, dev, test, self.generator = split(corpus, config)
        torch.manual_seed(config.seed)                      # every device
        self.model = Ada2I(config, backend=backend).to(device)
        self.optimizer = BalancedAdam(self.model)
        self.step = GraphedStep(self.model, self.optimizer, mode="auto" if graphs else "eager", context=contextlib.nullcontext
                                if precision == "float32" else lambda: torch.autocast(device.type, getattr(torch, precision)))
        self.told: str | None = ""                          # why steps are no CUDA graphs, as the user knows it
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, "min", factor=config.scheduler_factor, patience=config.scheduler_patience)
        self.dev = [batch.to(device) for batch in batches(corpus, dev, config)]
        self.test = list(batches(corpus, test, config))
        self.state = _State()

    def go(self, resume: bool, board_dir: str | None) -> dict[str, Any]:
        state, config = self.state, self.config
        if resume and os.path.exists(self._path("checkpoint.pt")):
            self._restore()
        board = Board(board_dir, state.epoch + 1, self.say)
        try:
            while not state.stopped and state.epoch < config.epochs:
                self._epoch(board)
        finally:
            board.close()
        if state.best_model is None:
            raise RunError(f"seed {config.seed}: {state.stopped} before there was a best state; try a lower learning_rate")
        self.model.load_state_dict(state.best_model)
        found = evaluate(self.model, self.test, self.device).scores(self.corpus.class_names)
        result = {"seed": config.seed, "best_epoch": state.best_epoch, "epochs": state.epoch, "stopped": state.stopped or "all epochs done",
                  "dev_weighted_f1": state.best_score, "seconds": state.seconds, "test": found}
        write_json(self._path("result.json"), result)
        self.say(f"seed {config.seed}: best epoch {state.best_epoch} of {state.epoch} ({result['stopped']}), "
                 f"test W-F1 {100 * found['weighted_f1']:.2f}, accuracy {100 * found['accuracy']:.2f}")
        return result

    # -- an epoch ----------------------------------------------------------------------------------------------------

    def _epoch(self, board: Board) -> None:
        state, config = self.state, self.config
        epoch = state.epoch + 1
        lr = self.optimizer.param_groups[0]["lr"]
        start = time.perf_counter()
        row = {"epoch": epoch, **self._train(epoch)}
        if self.device.type == "cuda" and self.step.why_not() != self.told:
            self.told = self.step.why_not()
            self.say(f"training steps are {f'ordinary ones, no CUDA graphs: {self.told}' if self.told else 'CUDA graphs'}")
        trained = time.perf_counter()
        if not math.isfinite(row["train_loss"]):
            state.stopped = f"the training loss became {row['train_loss']} in epoch {epoch}"
            self.say(f"seed {config.seed}: {state.stopped}; training ends here")
            return
        dev = evaluate(self.model, self.dev, self.device)
        found = dev.scores(self.corpus.class_names)
        self.scheduler.step(dev.loss)
        finished = time.perf_counter()
        row |= {"dev_loss": dev.loss, "dev_weighted_f1": found["weighted_f1"], "dev_accuracy": found["accuracy"], "lr": lr,
                "seconds": trained - start, "dev_seconds": finished - trained}
        for m, score in found["unimodal"].items():
            row |= {f"dev_weighted_f1_{m}": score["weighted_f1"], f"dev_accuracy_{m}": score["accuracy"]}

        better = row["dev_weighted_f1"] > state.best_score
        if better:
            state.best_epoch, state.best_score, state.stale = epoch, row["dev_weighted_f1"], 0
            state.best_model = {name: x.detach().clone() for name, x in self.model.state_dict().items()}
        else:
            state.stale += 1
        state.epoch = epoch
        state.seconds += finished - start
        state.history.append(row)
        if state.stale >= config.early_stopping:
            state.stopped = f"{state.stale} epochs without a better dev W-F1"

        last = bool(state.stopped) or epoch == config.epochs
        if better:
            checkpoint.save(self._path("best.pt"), "model", config, self.about, model=state.best_model, epoch=epoch,
                            dev_weighted_f1=state.best_score)
        if last or epoch % self.every == 0:
            self._save()
        write_csv(self._path("epochs.csv"), state.history, epoch_columns(config.modalities))
        board.add(row, config.modalities)
        self.say(self._line(row, better))

    def _train(self, epoch: int) -> dict[str, float]:
        """One pass over the training conversations; no host synchronisation before its end."""
        config = self.config
        modulate = config.modulation and config.modulation_start <= epoch <= config.modulation_end
        self.generator.shuffle(self.order)
        self.model.train()
        results = []
        total = math.ceil(len(self.order) / config.batch_size)
        on_device = ahead(batches(self.corpus, self.order, config), self.device)
        for batch in self._progress(on_device, total, f"epoch {epoch}/{config.epochs}"):
            results.append(self.step(batch, modulate))
        row = {name: sum(torch.stack([getattr(r, key) for r in results]).tolist())
               for name, key in (("train_loss", "loss"), ("feature_loss", "feature_loss"))}
        for m in config.modalities:
            row[f"ratio_{m}"] = torch.stack([r.ratio[m] for r in results]).mean().item()
            row[f"coefficient_{m}"] = torch.stack([r.coefficient[m] for r in results]).mean().item()
        return row

    def _progress(self, items: Iterable, total: int, title: str) -> Iterable:
        if not self.bar:
            return items
        return need("tqdm", "a progress bar").tqdm(items, title, total, leave=False, file=sys.stderr)

    def _line(self, row: Mapping[str, float], better: bool) -> str:
        ratio = " ".join(f"{m} {row[f'ratio_{m}']:.2f}" for m in self.config.modalities)
        width = len(str(self.config.epochs))
        return (f"epoch {row['epoch']:{width}}/{self.config.epochs}  loss {row['train_loss']:.3f}  dev loss {row['dev_loss']:.3f}  "
                f"dev W-F1 {100 * row['dev_weighted_f1']:.2f}{'*' if better else ' '} accuracy {100 * row['dev_accuracy']:.2f}  "
                f"ratio {ratio}  lr {row['lr']:.2g}  {row['seconds'] + row['dev_seconds']:.1f} s")

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _save(self) -> None:
        state, model = self.state, self.model.state_dict()
        # The best state of this very epoch is the model itself: shared storages are written once.
        best = model if state.best_epoch == state.epoch else state.best_model
        numbers = {"python": self.generator.getstate(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            numbers["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint.save(
            self._path("checkpoint.pt"), "run", self.config, self.about, model=model, epoch=state.epoch,
            optimizer=self.optimizer.state_dict(), scheduler=self.scheduler.state_dict(),
            best={"epoch": state.best_epoch, "dev_weighted_f1": state.best_score, "model": best}, stale=state.stale,
            history=state.history, order=self.order, random=numbers, seconds=state.seconds, stopped=state.stopped)

    def _restore(self) -> None:
        path, state = self._path("checkpoint.pt"), self.state
        values = checkpoint.load(path, "run")
        checkpoint.check_config(values, self.config, path)
        checkpoint.check_corpus(values, self.corpus, path, labels=True)
        for key in ("conversations", "utterances"):
            if values["corpus"][key] != self.about[key]:
                raise RunError(f"{path} is of another corpus: {values['corpus'][key]} {key} there and {self.about[key]} here")
        try:
            self.model.load_state_dict(values["model"])
            self.optimizer.load_state_dict(values["optimizer"])
            self.scheduler.load_state_dict(values["scheduler"])
            version, numbers, gauss = values["random"]["python"]
            self.generator.setstate((version, tuple(numbers), gauss))
            torch.set_rng_state(values["random"]["torch"])
            if self.device.type == "cuda" and "cuda" in values["random"]:
                torch.cuda.set_rng_state(values["random"]["cuda"], self.device)
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            raise RunError(f"{path} does not fit this package: {str(error).strip().splitlines()[0]}") from None
        self.order[:] = values["order"]
        state.epoch, state.stale, state.history = values["epoch"], values["stale"], list(values["history"])
        state.seconds, state.stopped = values["seconds"], values.get("stopped", "")
        best = values["best"]
        state.best_epoch, state.best_score = best["epoch"], best["dev_weighted_f1"]
        state.best_model = {name: x.to(self.device) for name, x in best["model"].items()}
        self.say(f"seed {self.config.seed}: resumed after epoch {state.epoch}")


@contextlib.contextmanager
def _own_random_state(device: torch.device):
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _importable(module: str) -> bool:
    try:
        need(module, "")
    except RunError:
        return False
    return True
