"""The whole model and whole training steps on the native CPU ops, in float32, against the textbook in float64."""

from __future__ import annotations

import threading

import pytest
import torch

from ada2i_fast import Ada2I, BalancedAdam, DialogueBatch, cpu, reference
from ada2i_fast.data import synthetic_corpus
from ada2i_fast.modules import FeatureWeighting
from model_cases import padded_case, small_config

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
LENGTHS = [7, 3, 13, 1]


def models(preset, **changes):
    """Textbook in float64, textbook in float32, fast in float32 on native ops: the same parameters, exactly."""
    config = small_config(preset, **{**dict(noise="none", input_widths={"a": 20, "t": 36, "v": 33}), **changes})
    torch.manual_seed(4)
    fast = Ada2I(config)
    exact, usual = reference.Ada2I(config).double(), reference.Ada2I(config)
    usual.load_state_dict(fast.state_dict())
    exact.load_state_dict({name: v.double() for name, v in fast.state_dict().items()})
    tensors, lengths, labels = padded_case(LENGTHS, config.input_widths, dtype=torch.float32)
    batch = DialogueBatch.from_padded(tensors, lengths, labels)
    return ((exact, lambda: exact({m: x.double() for m, x in tensors.items()}, lengths, labels)),
            (usual, lambda: usual(tensors, lengths, labels)), (fast, lambda: fast(batch)))


@pytest.mark.parametrize("preset", ["published", "released"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_error_of_outputs_and_gradients(preset, train):
    """At most twice the textbook's own float32 error plus 32 roundings of the largest element, tensor by tensor."""
    results = []
    for model, call in models(preset):
        model.train(train)
        out = call()
        out.loss.backward()
        results.append([out.log_prob.detach(), out.loss.detach(), out.feature_loss.detach(),
                        *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())])
    for i, (e, u, got) in enumerate(zip(*results)):
        assert (got - e).abs().max() <= 2 * (u - e).abs().max() + 32 * 2.0 ** -24 * e.abs().max(), i


CORPUS = synthetic_corpus(conversations=16, min_length=2, max_length=6, widths={"t": 14, "a": 10, "v": 12})


def steps(model, batches, seed, lr=1e-3, turn=0):
    """Trains over `batches` (lists of conversations) with modulation. Returns the losses.

    turn: so many conversations of each batch change places, which changes nothing but the order of sums.
    """
    torch.manual_seed(seed)
    textbook = isinstance(model, reference.Ada2I)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=1e-8) if textbook else BalancedAdam(model, lr=lr, backend="cpu")
    losses = []
    for members in batches:
        batch = CORPUS.batch([*members[turn:], *members[:turn]]).to(dtype=dtype)
        model.zero_grad()
        if textbook:
            parts = [x.split(batch.lengths) for x in batch.features.values()]
            tensors = {m: torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for m, x in zip(batch.features, parts)}
            out = model(tensors, torch.tensor(batch.lengths), batch.labels)
        else:
            out = model(batch)
        out.loss.backward()
        if textbook:
            reference.balanced_step(model, optimizer, out.ratio)
        else:
            optimizer.step(out.ratio)
        losses.append(out.loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def learner(preset, maker, **changes):
    torch.manual_seed(4)
    config = small_config(preset, input_widths=CORPUS.widths, hidden_dim=12, tensor_rank=3, feedforward_dim=24, encoder_layers=1, **changes)
    start = reference.Ada2I(config).state_dict()
    model = maker(config)
    model.load_state_dict(start)
    return model


@pytest.mark.parametrize("preset", ["published", "released"])
def test_200_steps_stay_as_near_to_float64_as_the_textbook(preset):
    """Losses without dropout and noise, against the textbook in float64.

    A step multiplies what the steps before left of their rounding, so an error bound for one step says nothing after many. What float32 can do
    is measured: the textbook in float32 with the sums in three orders. The largest distance of the curve, and its root mean square, are at
    most twice the largest of those three, plus 32 roundings of the largest loss.
    """
    order = [[(4 * step + i) % 16 for i in range(4)] for step in range(200)]
    exact = steps(learner(preset, reference.Ada2I, noise="none").double(), order, 0)
    usual = [steps(learner(preset, reference.Ada2I, noise="none"), order, 0, turn=turn) - exact for turn in range(3)]
    got = steps(learner(preset, Ada2I, noise="none"), order, 0) - exact
    assert exact[-16:].mean() < exact[:16].mean() - 0.5                     # it learns
    floor = 32 * 2.0 ** -24 * exact.abs().max()
    for size in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
        limit = 2 * max(size(e) for e in usual) + floor
        assert size(got) <= limit, f"{size(got):.2e}, allowed {limit:.2e}"


def test_dropout_and_noise_train_like_the_textbooks():
    """60 steps with dropout and noise from one start, eight seeds each: the fast curves are draws from the textbook's distribution.

    Welch's t of four figures per run: the mean loss of each third, and how far the encoders moved, which tells a wrong spread of the noise.
    At 7 to 14 degrees of freedom |t| < 6 is a level of 5e-4 to 3e-5 per figure; the seeds are fixed.
    """
    order = [[(4 * step + i) % 16 for i in range(4)] for step in range(60)]
    found = []
    for maker in (reference.Ada2I, Ada2I):
        rows = []
        for seed in range(8):
            model = learner("published", maker, noise="gradient", dropout=0.3)
            start = [p.detach().clone() for p in model.net.encoder.parameters()]
            losses = steps(model, order, seed, lr=3e-3)
            moved = sum((p - q).square().sum() for p, q in zip(model.net.encoder.parameters(), start)).sqrt()
            rows.append(torch.stack([*losses.reshape(3, 20).mean(1), moved.detach().double()]))
        found.append(torch.stack(rows))
    book, fast = found
    t = (fast.mean(0) - book.mean(0)) / ((fast.var(0) + book.var(0)) / 8).sqrt()
    assert (t.abs() < 6).all(), f"{t.tolist()}: textbook {book.mean(0).tolist()}, fast {fast.mean(0).tolist()}"


def test_dropout_follows_torch_seed_and_differs_from_step_to_step():
    config = small_config("published", dropout=0.5)
    model = Ada2I(config)
    batch = DialogueBatch.from_padded(*padded_case(LENGTHS, dtype=torch.float32))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        out = model(batch)
        out.loss.backward()
        runs.append([out.log_prob.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1])) and not torch.equal(runs[0][0], runs[2][0])
    torch.manual_seed(1)
    first, second = model(batch).log_prob, model(batch).log_prob
    assert torch.equal(first, runs[0][0]) and not torch.equal(first, second)


def test_gradients_with_dropout_are_those_of_the_function_computed():
    """Central differences of a whole float32 model along its gradient, the masks held by the seed."""
    model = Ada2I(small_config("published", dropout=0.3, afw=False))
    batch = DialogueBatch.from_padded(*padded_case(LENGTHS, dtype=torch.float32))

    def loss():
        torch.manual_seed(3)
        return model(batch).loss

    model.zero_grad()
    loss().backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad / norm, alpha=sign * 2e-3)
            ends.append(loss().double())
            for p in parameters:
                p.sub_(p.grad / norm, alpha=sign * 2e-3)
    assert ((ends[0] - ends[1]) / 4e-3).item() == pytest.approx(norm.item(), rel=2e-2)


def test_autocast_runs():
    model = Ada2I(small_config("published", dropout=0.3))
    batch = DialogueBatch.from_padded(*padded_case(LENGTHS, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch)
    out.loss.backward()
    assert all(p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in model.parameters())


def test_several_threads_train_at_once():
    """Each thread with a model of its own gets the bits that it gets alone: nothing in the native ops is shared between calls."""
    batches = [DialogueBatch.from_padded(*padded_case(lengths, dtype=torch.float32)) for lengths in ([7, 3, 13, 1], [5, 5], [2, 9, 4])]
    config = small_config("published", dropout=0.3, noise="parameter")
    torch.manual_seed(0)
    start = Ada2I(config).state_dict()
    seeds = threading.Lock()

    def train(number, results):
        torch.set_num_threads(1)            # each Python thread has a number of its own, and MKL's sums depend on it
        with seeds:                         # torch's generator is one for all threads: what belongs together is drawn together
            model = Ada2I(config)
        model.load_state_dict(start)
        optimizer = BalancedAdam(model, lr=1e-3, backend="cpu")
        losses = []
        for step in range(12):
            model.zero_grad()
            with seeds:
                torch.manual_seed(100 * number + step)
                out = model(batches[(number + step) % 3])
            out.loss.backward()
            with seeds:
                torch.manual_seed(100 * number + step)
                optimizer.step(out.ratio)
            losses.append(out.loss.item())
        results[number] = [torch.tensor(losses), *(p.detach() for p in model.parameters())]

    alone, together = {}, {}
    for number in range(4):
        train(number, alone)
    threads = [threading.Thread(target=train, args=(number, together)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert all(torch.equal(a, b) for a, b in zip(alone[number], together[number], strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_compiles_whole_and_twice(train):
    """The whole model, native encoder ops included, in one graph, compiled for the first sizes and once for all others: the same bits, masks
    too, and the same gradients but for their order of sums."""
    torch._dynamo.reset()
    model = Ada2I(small_config("published", dropout=0.3 if train else 0.0)).train(train)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for number, lengths in enumerate(([7, 3, 5, 2], [4, 9, 3, 6], [5, 5, 8, 3], [3, 2, 11, 7])):
        batch = DialogueBatch.from_padded(*padded_case(lengths, dtype=torch.float32))
        results = []
        for call in (model, compiled):
            torch.manual_seed(0)
            model.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=number >= 2):
                out = call(batch)
            out.loss.backward()
            results.append([out.log_prob.detach(), out.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        for i, (a, b) in enumerate(zip(*results, strict=True)):
            assert (a - b).abs().max() <= (0 if i == 0 else 32 * 2.0 ** -24 * a.abs().max()), i


def test_released_padding_compiles_whole():
    """Where padded rows are rows: one graph, too, and the same bits."""
    torch._dynamo.reset()
    model = Ada2I(small_config("released", dropout=0.0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 5, 5], [7, 3, 5]):
        batch = DialogueBatch.from_padded(*padded_case(lengths, dtype=torch.float32))
        assert torch.equal(model(batch).log_prob, compiled(batch).log_prob)


def test_memory_grows_linearly_up_to_100_000_utterances():
    """What a layer keeps for backward, to the byte: 100 times the dialogues, 100 times the bytes, less what does not depend on them."""
    layer = FeatureWeighting([16] * 3, 4, 1, backend="cpu")
    kept = {}
    for dialogues in (20, 2_000):
        x = [torch.randn(50 * dialogues, 16, requires_grad=True) for _ in range(3)]
        offsets = torch.arange(0, 50 * dialogues + 1, 50)
        free = {t.untyped_storage().data_ptr() for t in (*x, offsets, *layer.parameters())}
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
            out, loss = layer(x, offsets)
        kept[dialogues] = sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in free)
    assert 1_000 * 3 * 16 * 4 < kept[20] and kept[2_000] <= 100 * kept[20]
