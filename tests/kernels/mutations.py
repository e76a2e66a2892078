"""Break the Triton kernels on purpose, one place at a time, and see whether the interpreter cases notice.

    python tests/kernels/mutations.py [NUMBER ..]

Each mutation is made in a copy of kernels/, and a few small cases run on it. Exit status 1 if one survives.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SCRIPT = Path(__file__).with_name("triton_cases.py")
RING = ["one-modality-rank-1", "float16-rank-3", "three-modalities"]        # in this order, until one fails
MAPPING = ["mapping-one-row", "mapping"]
LIBRARY = ["library-one-modality", "library-three-modalities"]
FUSED = ["fused-one-row", "fused-57"]
ATTENTION = ["attention-head-1", "attention-short"]

# kind, file, text, replacement, cases
MUTATIONS = [
    ("scale", "tensor_ring.py", "w = narrow(scale * v, BLOCK_N, RP, RO)\n\n    d = d0", "w = narrow(v, BLOCK_N, RP, RO)\n\n    d = d0", RING),
    ("sign", "tensor_ring.py", "gated = attention * x_tile + beta * x_tile", "gated = attention * x_tile - beta * x_tile", RING),
    ("mask", "tensor_ring.py", "u = tl.where(inside[:, None], q1 * k1, 0.0)", "u = q1 * k1", ["three-modalities"]),
    ("index", "tensor_ring.py", "lookup(j, RING, M, M - 1, p) * tiles", "lookup(j, RING, M, M - 1, 0) * tiles", ["three-modalities"]),
    ("bound", "tensor_ring.py", "inside = rows < end\n    v =", "inside = rows <= end\n    v =", ["three-modalities"]),
    ("scale", "tensor_ring.py", "BLOCK_D), gated * keep_scale, 0.0", "BLOCK_D), gated, 0.0", ["three-modalities"]),
    ("sign", "tensor_ring.py", "            g += t", "            g -= t", ["three-modalities"]),
    ("index", "tensor_ring.py", "g_q1 = nearest(g_u * k1, PRECISION)", "g_q1 = nearest(g_u * q1, PRECISION)", RING),
    ("scale", "tensor_ring.py", "return total * (scale / length", "return total * (1.0 / length", ["float16-rank-3", "three-modalities"]),
    ("index", "tensor_ring.py", "if code % 2 == 0:", "if code % 2 == 1:", ["three-modalities"]),
    ("index", "tensor_ring.py", "return k * R + o, (k < R) & (o < R)", "return k * R + o, (k < R)", ["float16-rank-3"]),
    ("bound", "tensor_ring.py", "tl.minimum((split + 1) * per_split, rows_total), (role", "(split + 1) * per_split, (role", ["three-modalities"]),
    ("index", "tensor_ring.py", "if k0 == 0:", "if k0 == 1:", RING),
    ("bound", "common.py", "low + lane * step\n        inside = lane * step < count", "low + lane * step\n        inside = lane * step < count - 1", ["three-modalities"]),
    ("index", "common.py", "tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))", ["dropout"]),
    ("bound", "common.py", "words >= tl.full", "words > tl.full", ["dropout"]),
    ("bound", "common.py", "(column < BOUNDS[kind + 1])", "(column <= BOUNDS[kind + 1])", RING),
    ("index", "common.py", "        at += TOGETHER * GROUP * LENGTH", "        at += GROUP * LENGTH", ["reduce"]),
    ("sign", "attention_mapping.py", "(-factor * own)", "(factor * own)", MAPPING),
    ("bound", "attention_mapping.py", "    inside = rows < rows_total\n    kind", "    inside = rows <= rows_total\n    kind", MAPPING),
    ("scale", "attention_mapping.py", "tl.store(loss, coefficient * ", "tl.store(loss, ", MAPPING),
    ("index", "attention_mapping.py", "losses + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1))", "losses + tl.program_id(0)", ["mapping"]),
    ("mask", "attention_mapping.py", "tl.where(mask, tl.abs(difference), 0.0)", "tl.abs(difference)", MAPPING),
    ("sign", "attention_mapping.py", "tl.store(sign + at, (difference > 0).to(tl.int8) - (difference < 0).to(tl.int8), mask=mask)", "tl.store(sign + at, (difference >= 0).to(tl.int8) - (difference < 0).to(tl.int8), mask=mask)", MAPPING),
    # ---- products through the library
    ("index", "tensor_ring.py", "tl.where(column == R * R, bias, value)", "tl.where(column == R * R, 0.0, value)", LIBRARY),
    ("mask", "tensor_ring.py", "tl.where(pad == R * R, 1.0, 0.0)", "tl.where(pad >= R * R, 0.0, 1.0)", LIBRARY),
    ("index", "tensor_ring.py", "rows = first.to(tl.int64) + local", "rows = local", ["library-parts"]),
    ("scale", "tensor_ring.py", "scale * tl.sum(s * u", "tl.sum(s * u", LIBRARY),
    ("index", "tensor_ring.py", "(rows - first)[:, None] * STRIDE", "rows[:, None] * STRIDE", ["library-parts"]),
    ("sign", "tensor_ring.py", "mean *= scale", "mean *= -scale", ["library-three-modalities"]),
    ("index", "tensor_ring.py", "store_part(g_v * k2, 1,", "store_part(g_v * q2, 1,", LIBRARY),
    ("mask", "tensor_ring.py", "            tl.store(sums + part * R + r, tl.zeros((RP,), tl.float32), mask=r < R)\n", "            pass\n", ["library-three-modalities"]),
    ("index", "tensor_ring.py", "tl.dot(g_v, tl.trans(c), input_precision=\"ieee\")", "tl.dot(g_v, c, input_precision=\"ieee\")", ["library-three-modalities"]),
    ("index", "common.py", "else parts.sum(0)", "else parts[0]", ["library-mapping-float16"]),
    ("bound", "tensor_ring.py", "mask=(rows - first < padded)[:, None]", "mask=(rows < last)[:, None]", ["library-three-modalities"]),
    ("bound", "tensor_ring.py", "mask = (local < padded)[:, None, None]", "mask = inside[:, None, None]", ["library-three-modalities"]),
    ("scale", "tensor_ring.py", "    if SHARE:\n        g_x += tl.load", "    if SHARE:\n        g_x += 0 * tl.load", ["library-three-modalities"]),
    ("index", "tensor_ring.py", "rows[:, None] * SHARE + d[None, :]", "at", ["library-gate"]),
    ("sign", "tensor_ring.py", "t *= -tl.load(factor)", "t *= tl.load(factor)", ["library-gate"]),
    ("scale", "tensor_ring.py", "            if INTO:\n                g_x += tl.load", "            if INTO:\n                g_x += 0 * tl.load", ["three-modalities"]),
    ("index", "tensor_ring.py", "at += COUNT * SPLITS * D * COLUMNS", "at += SPLITS * D * COLUMNS", ["library-chunks"]),
    ("index", "tensor_ring.py", "split = local * SPLITS +", "split = local +", ["library-three-modalities"]),
    ("index", "tensor_ring.py", "grad_attention += local.to(tl.int64) * padded * STRIDE", "grad_attention += local.to(tl.int64) * last * STRIDE", ["library-three-modalities"]),
    ("index", "tensor_ring.py", "sums += (tile * M + j) * (4 * R)", "sums += (tile + j) * (4 * R)", ["library-three-modalities"]),
    ("index", "tensor_ring.py", "narrowed + local * (4 * R * D) + i", "narrowed + i", ["library-bfloat16-mixed"]),
    ("index", "attention_mapping.py", "at = first.to(tl.int64) * D + i", "at = i", ["library-mapping-float16"]),
    ("index", "attention_mapping.py", "tl.store(losses + place + tl.program_id(0)", "tl.store(losses + tl.program_id(0)", ["library-mapping-bfloat16"]),
    ("index", "attention_mapping.py", "d, losses + place + tl.program_id(0)", "d, losses + tl.program_id(0)", ["library-mapping"]),
    ("index", "attention_mapping.py", "small = tl.dot(x_1, phi_0, small)", "small = tl.dot(x_2, phi_1, small)", ["library-mapping-close"]),
    ("index", "attention_mapping.py", "small = tl.dot(x_0, phi_2, small)", "small = tl.dot(x_2, phi_2, small)", ["library-mapping-close"]),
    ("sign", "attention_mapping.py", "rest -= x_0.to(tl.float32)", "rest += x_0.to(tl.float32)", ["library-mapping"]),
    ("bound", "attention_mapping.py", "rows_total, D, BLOCK_N, BLOCK_D)\n    inside = rows < rows_total", "rows_total, D, BLOCK_N, BLOCK_D)\n    inside = rows <= rows_total", ["library-mapping"]),
    ("sign", "attention_mapping.py", "(-tl.load(factor) * s)", "(tl.load(factor) * s)", ["library-mapping-one-row"]),
    ("index", "attention_mapping.py", "sums + row // BLOCK_N * D + d", "sums + d", ["library-mapping-two-widths"]),
    ("scale", "attention_mapping.py", "rest -= value.to(tl.float32)", "rest -= 0.5 * value.to(tl.float32)", ["library-mapping"]),
    ("index", "attention_mapping.py", "((PARTS - 1 - part) * COLUMNS + d)[None, :], value", "((PARTS - 1) * COLUMNS + d)[None, :], value", ["library-mapping"]),
    ("mask", "attention_mapping.py", "mask=(rows < last)[:, None] & (d < D)[None, :], other=0.0)\n    if factor", "mask=(d < D)[None, :] & (rows < last + 1)[:, None], other=0.0)\n    if factor", ["library-mapping-two-widths"]),
    ("index", "attention_mapping.py", "grad_x[j].shape[1], 1, width)", "grad_x[j].shape[1], width, 1)", ["library-mapping"]),
    ("index", "attention_mapping.py", "tl.program_id(0) + first\n    tiles", "tl.program_id(0)\n    tiles", ["mapping-beside"]),
    ("index", "tensor_ring.py", 'PROJECTIONS: tl.constexpr = 0 if PART == "map" else D_BLOCKS', "PROJECTIONS: tl.constexpr = D_BLOCKS", ["beside"]),
    ("bound", "attention_mapping.py", "tl.where((rows < tl.load(counted))", "tl.where((rows <= tl.load(counted))", ["mapping-counted"]),
    ("scale", "attention_mapping.py", "factor = factor * rows_total / tl.load(counted)", "factor = factor", ["mapping-counted"]),
    ("scale", "attention_mapping.py", "        coefficient = coefficient * rows_total / tl.load(counted)\n    mapped", "        coefficient = coefficient + 0.0\n    mapped", ["mapping-counted"]),
    ("bound", "attention_mapping.py", "tl.where(at < tl.load(counted) * D, difference, 0.0)", "tl.where(at <= tl.load(counted) * D, difference, 0.0)", ["mapping-counted"]),
    # ---- cosine_fusion
    ("sign", "cosine_fusion.py", "u -= along[:, None]", "u += along[:, None]", ["fusion-published"]),
    ("scale", "cosine_fusion.py", "cosine *= (scale * inverse(norm))[:, None]", "cosine *= inverse(norm)[:, None]", ["fusion-published"]),
    ("scale", "cosine_fusion.py", "other=0.0).to(tl.float32) / M", "other=0.0).to(tl.float32)", ["fusion-released"]),
    ("index", "cosine_fusion.py", "tl.store(log_prob + (m * rows_total.to(tl.int64) + rows)", "tl.store(log_prob + (m + rows)", ["fusion-published"]),
    ("index", "cosine_fusion.py", "logits = tl.where((c < C)[None, :], mapped if LINEAR else cosine", "logits = tl.where((c < C)[None, :], cosine if LINEAR else mapped", ["fusion-released"]),
    ("mask", "cosine_fusion.py", "mapped if LINEAR else cosine, -float(\"inf\"))", "mapped if LINEAR else cosine, 0.0)", ["fusion-published"]),
    ("bound", "cosine_fusion.py", "mask=inside, other=-1)", "mask=inside, other=0)", ["fusion-published"]),
    ("bound", "cosine_fusion.py", "mask=(place < programs)[:, None]", "mask=(place <= programs)[:, None]", ["fusion-published"]),
    ("mask", "cosine_fusion.py", "tl.min(tl.where(m < M, score, float(\"inf\")), axis=0)", "tl.min(score, axis=0)", ["fusion-published"]),
    ("mask", "cosine_fusion.py", "tl.where(whole == whole, weakest, whole)", "weakest", ["fusion-zeros"]),
    ("mask", "cosine_fusion.py", "tl.where(norm < 1e-12, 0.0, along / (norm * norm))", "along / (norm * norm)", ["fusion-zeros"]),
    ("bound", "cosine_fusion.py", "tl.minimum((split + 1) * per_split, rows_total), program % D_BLOCKS", "(split + 1) * per_split, program % D_BLOCKS", ["fusion-splits"]),
    ("index", "cosine_fusion.py", "        gradients += STRIDE", "        gradients += STRIDE // 2", ["fusion-splits"]),
    ("index", "cosine_fusion.py", "if (m == 0) & (d0 == 0):", "if (m == 0) & (d0 == 1):", ["fusion-splits"]),
    ("scale", "cosine_fusion.py", "value = factor * (summed(", "value = (summed(", ["fusion-published"]),
    ("sign", "cosine_fusion.py", "(value - along[None, :] * v)", "(value + along[None, :] * v)", ["fusion-released"]),
    ("index", "cosine_fusion.py", "tl.div_rn(score, weakest)", "tl.div_rn(weakest, score)", ["fusion-published"]),
    # ---- head_losses
    ("mask", "head_losses.py", "(label != -100)[:, None], factor * difference", "(label != -1)[:, None], factor * difference", ["head-none"]),
    ("bound", "head_losses.py", "mask=inside, other=-100)\n            of_head", "mask=inside, other=0)\n            of_head", ["head"]),
    ("sign", "head_losses.py", "g += given - prob *", "g += given + prob *", ["head-none"]),
    ("scale", "head_losses.py", "value = tl.div_rn(main, count)", "value = main", ["head-none"]),
    ("index", "head_losses.py", "partial += tl.program_id(0).to(tl.int64) * 3", "partial += tl.program_id(0).to(tl.int64) * 2", ["head-two-launches-none"]),
    ("bound", "head_losses.py", "tl.minimum((split + 1) * per_split, rows_total)", "(split + 1) * per_split", ["head"]),
    ("index", "head_losses.py", "if i0 == 0:", "if i0 == 1:", ["head"]),
    ("mask", "head_losses.py", "g_before = tl.where(before <= 0.0, 0.0, tl.dot(g, w_2, input_precision=\"ieee\"))\n        g_1", "g_before = tl.dot(g, w_2, input_precision=\"ieee\")\n        g_1", ["head"]),
    ("index", "head_losses.py", "total = tl.dot(g_before, w_1, total,", "total = tl.dot(g_before, w_1,", ["head-wide"]),
    ("scale", "dropout.py", "tl.where(kept, value * keep_scale, 0.0).to", "tl.where(kept, value, 0.0).to", ["fused-57"]),
    ("bound", "dropout.py", "mask = (rows < rows_total)[:, None]", "mask = (rows <= rows_total)[:, None]", FUSED),
    ("index", "dropout.py", "gradients + split * D + d", "gradients + d", ["fused-57"]),
    ("sign", "dropout.py", "(h - mean_h[:, None] - n", "(h - mean_h[:, None] + n", ["fused-57"]),
    ("mask", "dropout.py", "g_x = tl.where(kept, g_s * keep_scale, 0.0)", "g_x = g_s", ["fused-57"]),
    ("mask", "dropout.py", "(d0 + tl.arange(0, BLOCK_D) < D)[None, :], s - mean", "(d0 + tl.arange(0, BLOCK_D) >= 0)[None, :], s - mean", FUSED),
    ("index", "dropout.py", "tl.store(to + D, tl.sum(sum_weight", "tl.store(to + D, tl.sum(sum_norm", FUSED),
    ("index", "dropout.py", "    own = tl.program_id(1) * BLOCK_D\n    s, _", "    own = 0\n    s, _", ["fused-two-blocks"]),
    ("scale", "dialogue_attention.py", "largest, total, HEADS)\n    d = own", "largest, total * 2, HEADS)\n    d = own", ATTENTION),
    ("sign", "dialogue_attention.py", "weights * (g - delta[:, None])", "weights * (g + delta[:, None])", ["attention-short"]),
    ("bound", "dialogue_attention.py", "        there = others < end\n        if BLOCKS", "        there = others <= end\n        if BLOCKS", ATTENTION),
    ("bound", "dialogue_attention.py", "        there = others < end\n        if WHOLE", "        there = others <= end\n        if WHOLE", ATTENTION),
    ("mask", "dialogue_attention.py", "inside[:, None] & others_inside[None, :], tl.exp", "inside[:, None], tl.exp", ["large-scores"]),
    ("index", "dialogue_attention.py", "kept = keep(seed, stream, rows, place,", "kept = keep(seed, stream, rows, place * 0,", ["attention-one-dialogue"]),
    ("index", "dialogue_attention.py", "stream + h, first, start, end, own,\n                          scale", "stream, first, start, end, own,\n                          scale", ["attention-short"]),
    ("scale", "dialogue_attention.py", "sums * shrink[:, None], PRECISION", "sums, PRECISION", ["attention-one-dialogue"]),
    ("scale", "dialogue_attention.py", "tl.store(to, (sum_k * scale)", "tl.store(to, (sum_k)", ["attention-short"]),
    ("index", "dialogue_attention.py", "tl.store(to + WIDTH, sum_v", "tl.store(to + WIDTH, sum_k", ATTENTION),
]


def caught_by(file: str, text: str, replacement: str, cases: list[str]) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(KERNELS, Path(folder) / "kernels", ignore=shutil.ignore_patterns("__pycache__")))
        source = (copy / file).read_text()
        assert text in source, f"{file} no longer has: {text}"
        (copy / file).write_text(source.replace(text, replacement))
        for case in cases:
            run = subprocess.run([sys.executable, SCRIPT, "--only", case, "--kernels", str(copy)], capture_output=True, text=True)
            if run.returncode:
                return f"{case} (ended with {run.returncode})"
            checks = json.loads(run.stdout)["checks"]
            broken = [what for what, error, allowed in checks if not error <= allowed]
            if broken:
                return f"{case}: {broken[0][:60]}"
    return None


def main() -> int:
    survived = 0
    wanted = [int(number) for number in sys.argv[1:]] or range(len(MUTATIONS))
    for number in wanted:
        kind, file, text, replacement, cases = MUTATIONS[number]
        found = caught_by(file, text, replacement, cases)
        survived += found is None
        print(f"{number:2} {kind:6} {file:21} {text.splitlines()[0].strip()[:50]:50} {found or 'SURVIVED'}", flush=True)
    print(f"{len(wanted) - survived} of {len(wanted)} mutations caught")
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main())
