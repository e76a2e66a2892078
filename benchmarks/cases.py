"""What is measured: dataset shapes, groups, and the work that each group cannot avoid.

A group is op / shape / pass / dtype; in it the implementations compete. Shapes are those of a training batch of the paper's
data sets, semantics those of the `published` preset.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ada2i_fast import Ada2IConfig

ITEM_SIZE = {"float32": 4, "bfloat16": 2}
# Of float32 master weights: Adam reads p, g, m, v and writes p, m, v.
ADAM_BYTES = 28


@dataclass(frozen=True)
class Shape:
    """lengths: utterances per dialogue. The rest is the model's configuration, by data set and changed fields."""

    name: str
    dataset: str
    lengths: tuple[int, ...]
    changes: tuple[tuple[str, object], ...] = ()

    @property
    def utterances(self) -> int:
        return sum(self.lengths)

    def config(self, preset: str = "published") -> Ada2IConfig:
        return Ada2IConfig.preset(preset, self.dataset, **dict(self.changes))


IEMOCAP = Shape("iemocap", "iemocap", (51, 46, 59, 50, 39, 55, 71, 65, 37, 27))
MELD = Shape("meld", "meld", (33, 3, 14, 5, 9, 2, 11, 6, 8, 5))
# 1,000 dialogues, as long as those of IEMOCAP.
MANY = Shape("1000 dialogues", "iemocap", IEMOCAP.lengths * 100)
MOSEI = Shape("mosei", "mosei7", (7, 3, 12, 5, 9, 1, 6, 22, 4, 8, 2, 10, 5, 7, 3, 14, 6, 4, 9, 2, 8, 5, 11, 3, 6, 17, 4, 7, 5, 2, 8, 9))


@dataclass(frozen=True)
class Case:
    """One group.

    op: "tensor_ring" | "attention_mapping" | "afw_layer" (both, one AFW layer with its loss) | "cosine_fusion" | "model".
    mode: "training" (forward and backward; for the model a whole step, optimiser included) | "evaluation" (forward only).
    implementations: who competes, of the textbook's kind; the backends of the device are added.
    """

    op: str
    shape: Shape
    mode: str = "training"
    dtype: str = "float32"
    preset: str = "published"
    compiled: bool = False
    sweep: str = ""                 # scaling only: the quantity on the horizontal axis, and its value
    at: int = 0

    @property
    def group(self) -> str:
        shape = self.shape.name if self.preset == "published" else f"{self.shape.name} {self.preset}"
        return " / ".join((self.op, shape, self.mode, self.dtype))

    def implementations(self, device: str) -> list[str]:
        graphed = device != "cpu" and self.mode == "training" and self.op in ("model", "afw_layer")
        step_on_gpu = device != "cpu" and self.op == "model" and self.mode == "training"
        return ["textbook", *(["compiled"] if self.compiled else []), *(["released"] if step_on_gpu and self.preset == "released" else []),
                "algebra", *(["cpu"] if device == "cpu" else ["triton", "cuda"]), *(["graph"] if graphed else [])]


def cases(op: str, compiled: set[tuple[str, str, str]], modes: tuple[str, ...] = ("training", "evaluation")) -> list[Case]:
    """An op on the three shapes, in both dtypes; torch.compile takes part in the named groups (it is slow to start)."""
    return [Case(op, shape, mode, dtype, compiled=(shape.name, mode, dtype) in compiled)
            for shape in (IEMOCAP, MELD, MOSEI) for mode in modes for dtype in ("float32", "bfloat16")]


def scaling() -> list[Case]:
    """One AFW layer in training against utterances, rank and width."""
    found = []
    for n in (100, 1_000, 10_000, 100_000):
        found.append(Case("afw_layer", Shape(f"{n} utterances", "iemocap", (50,) * (n // 50)), sweep="utterances", at=n))
    for rank in (1, 2, 4, 8, 16, 32):
        found.append(Case("afw_layer", replace(IEMOCAP, name=f"rank {rank}", changes=(("tensor_rank", rank),)), sweep="rank",
                          at=rank))
    for width in (64, 128, 256, 512, 1024):
        found.append(Case("afw_layer", replace(IEMOCAP, name=f"width {width}", changes=(("hidden_dim", width),)), sweep="width",
                          at=width))
    return found


def work(case: Case) -> tuple[float, float]:
    """(floating-point operations, bytes) that a perfect implementation of the case has to spend.

    Operations: matrix products of real rows, two per multiply-add; backward costs twice the forward, but for the gradient of the
    model's own inputs, and nothing is recomputed.
    Bytes: inputs, outputs and their gradients once per pass that needs them, parameters once per pass, their gradients
    once; intermediate results count as cached.
    """
    counted = parts(case).values()
    return sum(operations for operations, _ in counted), float(sum(touched for _, touched in counted))


def parts(case: Case) -> dict[str, tuple[float, float]]:
    """`work` by part of the case: of a model the parts of `benchmarks.profile`, of an op the op alone."""
    config = case.shape.config(case.preset)
    m, d, r, n = len(config.modalities), config.hidden_dim, config.tensor_rank, case.shape.utterances
    dialogues, training, size = len(case.shape.lengths), case.mode == "training", ITEM_SIZE[case.dtype]
    passes = 3 if training else 1

    ring = m * (n * (4 * d * r + 2 * r * r + r * r * d) + dialogues * (m - 2) * r ** 3)
    mapping = m * n * d * d
    ring_parameters, mapping_parameters = m * (4 * d * r + 4 * r + r * r * d + d), m * (d * d + d)
    rows = m * n * d * size
    if case.op == "cosine_fusion":          # forward x, joint, log_prob; backward x, g_joint, g_x
        classes = config.num_classes
        products, parameters = m * n * d * classes, classes * (m * d + (config.cosine_bias or not config.amw))
        # Scores that need products of their own have no gradient.
        scoring = products if config.amw == (config.score_from == "linear") else 0
        touched = rows * (3 if training else 1) + n * classes * (size * (2 if training else 1) + 4 * m) + parameters * size * passes
        return {case.op: (2 * (passes * products + scoring), touched)}
    if case.op == "tensor_ring":            # forward x, out, target; backward x, g_out, g_target, g_x
        return {case.op: (2 * passes * ring, rows * (7 if training else 3) + ring_parameters * size * passes)}
    if case.op == "attention_mapping":      # forward x, target; backward x, g_x, g_target
        return {case.op: (2 * passes * mapping, rows * (5 if training else 2) + mapping_parameters * size * passes)}
    if case.op == "afw_layer":              # forward x, out; backward x, g_out, g_x; no loss in evaluation
        multiply_adds, parameters = ring, ring_parameters
        if training:
            multiply_adds, parameters = multiply_adds + mapping, parameters + mapping_parameters
        return {case.op: (2 * passes * multiply_adds, rows * (5 if training else 2) + parameters * size * passes)}

    layers, f = config.encoder_layers, config.feedforward_dim
    lengths = case.shape.lengths
    if config.padding == "attended":        # padded rows are rows
        lengths, n = (max(lengths),) * dialogues, max(lengths) * dialogues
    pairs = sum(length * length for length in lengths)
    scale = config.afw_layers * n / case.shape.utterances
    products = first = attention = encoders = inputs = 0
    for w in config.input_widths.values():
        products += layers * n * (4 * w * w + 2 * w * f) + n * w * d
        first += 3 * n * w * w              # queries, keys and values of the first layer: nobody wants the input's gradient
        attention += layers * 2 * pairs * w
        encoders += layers * (4 * w * w + 2 * w * f + 9 * w + f) + w * d + d
        inputs += 4 * n * w
    found = {"encoder products, forward": (2 * products, encoders * size + inputs)}
    if training:
        found |= {"encoder products, input gradients": (2 * (products - first), encoders * size),
                  "encoder products, weight gradients": (2 * products, encoders * size)}
    found |= {"dialogue attention": (2 * passes * attention, 0),
              "feature weighting": (2 * passes * scale * (ring + training * mapping),
                                    (ring_parameters + training * mapping_parameters) * config.afw_layers * size * passes)}
    found["cosine fusion, head, losses, ratio"] = (2 * passes * m * n * d * config.num_classes, 0)
    if training:
        found["optimiser: update"] = (0, (encoders + config.afw_layers * (ring_parameters + mapping_parameters)) * ADAM_BYTES)
    return found


def floor_seconds(operations: float, touched: float, rate: float, bandwidth: float) -> float:
    """operations at the matrix rate [1/s] plus bytes at the bandwidth [B/s]."""
    return operations / rate + touched / bandwidth
