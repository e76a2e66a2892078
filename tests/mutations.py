"""Breaks one thing at a time and asks whether the tests notice: `python tests/mutations.py [backend ...]`.

The mutants of Triton are listed in tests/kernels/mutations.py, with the cases that each has to break; the others here. Per backend the working tree is copied to a temporary folder; there one mutant after the other is applied, what it needs is built, and
the backend's tests run until the first failure or the time limit. The unbroken copy runs first: it has to pass. Results go into
docs/mutations.md, sections of backends that did not run stay as they are. Exit status 1 if a mutant survived, 2 if a
mutant's text is no longer found in its file or the unbroken copy fails. Nothing else in the working tree is touched.

    python tests/mutations.py --check                # only look whether every mutant still fits its file
    python tests/mutations.py cuda --only barrier    # those whose kind or description holds the word
    python tests/mutations.py cpu --minutes 20       # begin no mutant after that; the page says how many did not run
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "mutations.md"


@dataclass(frozen=True)
class Mutant:
    """`old`, which occurs once in `file`, becomes `new`. kind: sign, bound, mask, barrier, scale or index."""

    backend: str
    kind: str
    file: str
    old: str
    new: str
    what: str


RING, MAPPING = "ada2i_fast/ops/tensor_ring.py", "ada2i_fast/ops/attention_mapping.py"
CPU_RING, CPU_MAPPING = "csrc/cpu/tensor_ring.inl", "csrc/cpu/attention_mapping.inl"
CPU_ATTENTION = "csrc/cpu/dialogue_attention.inl"
CPU_LINEAR, CPU_GEMM = "csrc/cpu/linear.inl", "csrc/cpu/gemm.inl"
ENCODER = "ada2i_fast/ops/encoder_layer.py"
FUSION, CPU_FUSION = "ada2i_fast/ops/cosine_fusion.py", "csrc/cpu/cosine_fusion.inl"
CUDA_RING, CUDA_MAPPING, CUDA_TILE = "csrc/cuda/tensor_ring.cuh", "csrc/cuda/attention_mapping.cuh", "csrc/cuda/tile.cuh"
CUDA_ADAM = "csrc/cuda/balanced_adam.cuh"
NODE, NODES, ENCODER_NODE, ADAM_NODE = (f"csrc/torch/{name}" for name in ("afw_layer.cpp", "common.h", "encoder_layers.cpp", "balanced_adam.cpp"))

MUTANTS = [
    # ---- the algebra in PyTorch
    Mutant("torch", "sign", RING, "gated = attention * x[j] + beta * x[j]", "gated = attention * x[j] - beta * x[j]", "the gate subtracts beta x"),
    Mutant("torch", "scale", RING, "w = scale * v[j]", "w = v[j]", "w without the attention scale"),
    Mutant("torch", "bound", RING, "lengths.clamp(min=1)", "(lengths + 1)", "means over one utterance too many"),
    Mutant("torch", "index", RING, "contracted = average[ring[j][0]]", "contracted = average[ring[j][-1]]", "the ring starts at its last modality"),
    Mutant("torch", "index", RING, '"nk,nko->no"', '"no,nko->nk"', "w = C v instead of C^T v"),
    Mutant("torch", "scale", RING, "* keep_mask(seed, j, *gated.shape, dropout) / (1.0 - dropout)",
           "* keep_mask(seed, j, *gated.shape, dropout)", "kept elements are not scaled up"),
    Mutant("torch", "sign", MAPPING, "(F.linear(x_j, w, b) - target_j)", "(F.linear(x_j, w, b) + target_j)", "the loss adds the target"),
    Mutant("torch", "scale", MAPPING, "[sum(elements)] * len(elements)", "[max(elements)] * len(elements)", "the mean over all divides by one modality"),
    Mutant("torch", "sign", MAPPING, "*(-s_j for s_j in s)", "*(s_j for s_j in s)", "sign of the target's gradient under create_graph"),
    Mutant("torch", "index", "ada2i_fast/ops/dropout.py", "torch.full_like(n, stream)", "torch.zeros_like(n)", "all modalities share a mask"),
    Mutant("torch", "index", "ada2i_fast/ops/dialogue_attention.py", "q, k, v = block", "q, v, k = block", "keys and values change places"),
    Mutant("torch", "index", "ada2i_fast/ops/cosine_fusion.py", 'axis = 0 if cosine_norm == "classes" else 1', 'axis = 1 if cosine_norm == "classes" else 0',
           "weights of unit norm over the other axis"),
    # ---- C++ for the CPU
    Mutant("cpu", "sign", CPU_RING, "auto gated = att * x_n + beta * x_n;", "auto gated = att * x_n - beta * x_n;", "the gate subtracts beta x"),
    Mutant("cpu", "sign", CPU_MAPPING, "store(grad_target + i * D + d, -factor * s, n);", "store(grad_target + i * D + d, factor * s, n);",
           "sign of the target's gradient"),
    Mutant("cpu", "scale", CPU_RING, "const T share = T(args->scale / double(ring.length(b)));", "const T share = T(1.0 / double(ring.length(b)));",
           "gradient through the means without the attention scale"),
    Mutant("cpu", "index", CPU_RING, "for (int64_t l = M - 2; l > i; --l) {", "for (int64_t l = M - 2; l > i + 1; --l) {",
           "the product rule leaves a factor out"),
    Mutant("cpu", "index", "csrc/cpu/philox.inl", "c0[k] = order + uint64_t(column / 4 + k * lanes);", "c0[k] = order + uint64_t(k * lanes);",
           "columns of a row share their random words"),
    Mutant("cpu", "index", "csrc/cpu/philox.inl", "n += rows - over;", "n += rows;", "short rows that share a vector of counters share their words"),
    Mutant("cpu", "index", "csrc/cpu/philox.inl", "bits |= kept_lanes(words + v, threshold, (T*)0) << v;",
           "bits |= kept_lanes(words, threshold, (T*)0) << v;", "the vectors of a few columns share what is dropped"),
    Mutant("cpu", "index", CPU_RING, "bits = Marks<T>::get(marks + i * mark_stride(D), d);", "bits = Marks<T>::get(marks, d);",
           "backward drops in all rows of a tile what forward dropped in the first"),
    Mutant("cpu", "index", CPU_RING, "(uint8_t*)t[SIGN * M + j] + rows * D + first * mark_stride(D)", "(uint8_t*)t[SIGN * M + j] + rows * D",
           "all tiles write down in one place what they drop"),
    Mutant("cpu", "bound", "csrc/cpu/vector.inl", "(ones + 8 - n * bytes / 4)", "(ones + 7 - n * bytes / 4)", "the last vector of a row lacks an element (AVX2)"),
    Mutant("cpu", "bound", "csrc/cpu/vector.inl", "    if (n & size) {", "    if (n >= size) {", "the last vector of a row takes what is not its own"),
    Mutant("cpu", "bound", CPU_ATTENTION, "total += first_lanes(weight, n - d, 0.0f);", "total += weight;",
           "the sum of a row's weights runs beyond its dialogue"),
    Mutant("cpu", "index", CPU_ATTENTION, "steps<E>(count), head, own.to_keys, block > 0);", "steps<E>(count), head, own.to_keys, false);",
           "of a long dialogue only the last queries reach the keys"),
    Mutant("cpu", "bound", CPU_ATTENTION, "steps<E>(n), head, O, 0, false);", "n / Step<E>::elements, head, O, 0, false);",
           "in bf16 the last value of an odd dialogue is left out"),
    Mutant("cpu", "bound", CPU_MAPPING, "const int64_t n = smaller(lanes, columns - v);", "const int64_t n = lanes;",
           "the last vector of a row runs beyond it"),
    Mutant("cpu", "bound", CPU_RING, "if (args->offsets[middle] <= n) low = middle;", "if (args->offsets[middle] < n) low = middle;",
           "a dialogue's first row belongs to the one before"),
    Mutant("cpu", "sign", CPU_RING, "if (mapping) target -= factor * load_signs<T>(sign + at, n);",
           "if (mapping) target += factor * load_signs<T>(sign + at, n);", "the loss's gradient of its target adds up the wrong way"),
    Mutant("cpu", "index", CPU_RING, "gated_target ? gated : att);", "gated_target ? att : gated);", "the loss of a layer compares with the other target"),
    Mutant("cpu", "scale", CPU_RING, "if (mapping) sum += factor * load(sums_at<E>(mapped, i, d));", "", "gradient of x without the loss's"),
    Mutant("cpu", "index", CPU_RING, "D, D, (P*)t[GRAD_PHI * M + j],", "D, D, (P*)t[GRAD_PHI * M],", "all gradients of Phi go to the first modality"),
    Mutant("cpu", "index", CPU_RING, "((const P*)t[PROJ_BIAS * M + 4 * j + r / R])[r % R]", "((const P*)t[PROJ_BIAS * M + 4 * j])[r % R]",
           "all four projections take the bias of q1"),
    Mutant("cpu", "mask", CPU_RING, "if (!gated_target) att += target;", "att += target;", "the target's gradient counts twice"),
    Mutant("cpu", "sign", "csrc/cpu/balanced_adam.inl", "store(g + d, load(g + d, n) * factor + noise * to_gradient, n);",
           "store(g + d, load(g + d, n) * factor - noise * to_gradient, n);", "the noise of modulation changes sign"),
    Mutant("cpu", "scale", "csrc/cpu/balanced_adam.inl", "auto gradient = load(g + d, n) * factor + noise * to_gradient;",
           "auto gradient = load(g + d, n) + noise * to_gradient;", "Adam sees the gradient without clipping and modulation"),
    Mutant("cpu", "mask", "csrc/cpu/dropout.inl", "g = load(out + at, left) > 0 ? g : Vector<float>{};", "", "gradients pass where ReLU or dropout cut off"),
    Mutant("cpu", "bound", "csrc/cpu/dropout.inl", "last = smaller(first + kRowBlock, rows);", "last = smaller(first + kRowBlock, rows - 1);",
           "the last row of a batch has no gradient"),
    Mutant("cpu", "index", "csrc/cpu/dropout.inl", "total += load(partial.of(block) + d);", "total += load(partial.data + d);",
           "the first block of rows stands for all in the bias"),
    Mutant("cpu", "index", CPU_LINEAR, "const S* row = x + (start + r) * n;", "const S* row = x + r * n;", "every pass sums the inputs of the first"),
    Mutant("cpu", "index", CPU_LINEAR, "grad_out + start * m + first, m, m - first", "grad_out + first, m, m - first",
           "every pass sums the gradients of the first"),
    Mutant("cpu", "bound", CPU_GEMM, "r + 1 < k ? row + m : nullptr, there > column", "row + m, there > column", "a pair of rows reaches beyond the last"),
    Mutant("cpu", "bound", CPU_GEMM, "i < smaller(to, height - s * kHeight<E>);", "i < to;", "the last strip's rows are written beyond the outputs"),
    Mutant("cpu", "bound", CPU_LINEAR, "smaller(used * kHeight<E>, m - first), right.data", "used * kHeight<E>, right.data",
           "the last strip's rows are written beyond the outputs (AMX)"),
    Mutant("cpu", "bound", CPU_GEMM, "const bool wide = columns > Lanes<T>::count;", "const bool wide = columns > kColumns<T>;", "the last panel is half as wide"),
    Mutant("cpu", "bound", CPU_GEMM, "kernels[n - column > columns / 2]", "kernels[n - column > columns]", "the last panel of several strips is half as wide (AMX)"),
    Mutant("cpu", "mask", CPU_LINEAR, "start > 0 ? load(c + v) + load(to + v, n - column - v) : load(c + v)", "load(c + v)", "the last pass stands for all"),
    Mutant("cpu", "index", CPU_LINEAR, "philox(mask.seed, row, mask.stream, column, words)", "philox(mask.seed, row, mask.stream, 0, words)",
           "all columns of a product share the mask of the first"),
    Mutant("cpu", "sign", CPU_LINEAR, "value = value < 0 ? Vector<float>{} : value;", "", "no ReLU in the product"),
    Mutant("torch", "scale", ENCODER, "grad_bias.to(bias.dtype)]", "grad_bias.to(bias.dtype) * 2]", "op by op the inner bias gets twice its gradient"),
    Mutant("cpu", "index", CPU_LINEAR, "stream(to + v, sum)", "stream(to, sum)", "past the caches the second half of a panel goes over the first"),
    Mutant("cpu", "bound", CPU_LINEAR, "large && n % lanes == 0 && ", "large && ", "rows of any length go past the caches"),
    Mutant("cpu", "mask", CPU_LINEAR, "start > 0 ? bias[s][i / lanes] + load(to, there) : bias[s][i / lanes]", "bias[s][i / lanes]",
           "the last pass stands for all in the bias"),
    Mutant("cpu", "index", CPU_LINEAR, "return weight + (first + r) * k + start;", "return weight + r * k + start;", "every job multiplies by the first columns"),
    Mutant("cpu", "index", CPU_LINEAR, "const float* from = weight + (start + r) * n + first;", "const float* from = weight + (start + r) * n;",
           "every job's input gradient is that of the first columns"),
    Mutant("cpu", "index", CPU_LINEAR, "load(bias + column + v, there)", "load(bias + v, there)", "every job adds the first biases"),
    Mutant("cpu", "index", CPU_GEMM, "if (start)\n      for (int i = 0; i < size", "if (start > kMostSteps)\n      for (int i = 0; i < size",
           "of a long sum the second part is left out"),
    Mutant("cpu", "index", CPU_GEMM, "_tile_dpbf16ps(2, 5, 6);\n    if (width == 1) continue;", "_tile_dpbf16ps(2, 4, 6);\n    if (width == 1) continue;", "the lower tile repeats the upper one's rows (AMX)"),
    Mutant("cpu", "index", CPU_GEMM, "then_left(1), meanwhile();\n      then_right(1), meanwhile();", "then_left(1), meanwhile();\n      then_right(0), meanwhile();",
           "of the products of floats' parts the one of both middle parts is another's double (AMX)"),
    Mutant("cpu", "index", CPU_GEMM, "take(0, 2), meanwhile();\n      then_right(1), meanwhile();\n      then_right(0), meanwhile();",
           "take(0, 2), meanwhile();\n      then_right(1), meanwhile();\n      then_right(1), meanwhile();",
           "signs meet the middle part of floats twice, and never the first (AMX)"),
    Mutant("cpu", "mask", CPU_GEMM, "rest_b - (Vector<float>)((Bits)rest_b & upper))}", "Vector<float>{})}",
           "every other float loses its last eight bits (AMX)"),
    Mutant("cpu", "index", CPU_GEMM, "(first + i) / per * columns, &steps", "i / per * columns, &steps",
           "half of a transposed weight's steps lie on the others (AMX)"),
    Mutant("cpu", "index", CPU_LINEAR, "{ pack_rows(next.start, strip, piece); }", "{ pack_rows(now.start, strip, piece); }",
           "every part of the depth takes the first elements of the rows (AMX)"),
    Mutant("cpu", "index", CPU_LINEAR, "sums + sums_size(strips, now.first - begin)", "sums", "all blocks of columns share their sums (AMX)"),
    Mutant("cpu", "index", CPU_GEMM, "put(row, sums + sums_size(strips, column) + row", "put(row, sums + sums_size(1, column) + row",
           "the sums of later columns are those of other rows (AMX)"),
    Mutant("cpu", "index", CPU_LINEAR, "panel + (turn + 1) % 2 * panel_size", "panel + turn % 2 * panel_size",
           "a panel is packed over the one that is multiplied (AMX)"),
    Mutant("cpu", "barrier", CPU_LINEAR, "free = which + 1", "free = which + 2", "rows are packed anew before theirs have served (AMX)"),
    Mutant("cpu", "index", CPU_GEMM, "consume((const T*)before, column - columns", "consume((const T*)now, column - columns",
           "what follows a product takes the panel that is still multiplied (AMX)"),
    Mutant("cpu", "bound", CPU_GEMM, "last = (n - 1) / columns * columns", "last = n / columns * columns", "a last panel that is full is lost (AMX)"),
    Mutant("cpu", "index", CPU_GEMM, "{ put(r, c, begin + column); }", "{ put(r, c, column); }", "all columns of a gradient go where its first ones do (AMX)"),
    Mutant("cpu", "index", CPU_RING, "place + i / per * per, here", "i / per * per, here", "the rows u w^T of all tiles are packed over the first ones"),
    Mutant("cpu", "index", CPU_RING, "outer_size + (place + i) * R * R;", "outer_size + i * R * R;", "the rows u w^T of all tiles are written over the first ones (AMX)"),
    Mutant("cpu", "index", CPU_GEMM, "if (packed_rows != from) pack", "if (!packed_rows) pack", "a thread multiplies all gradients by its first rows (AMX)"),
    Mutant("cpu", "mask", CPU_RING, "if (!used || modality == j) return;", "if (!used || modality >= 0) return;",
           "a thread weighs all modalities by the weights of its first"),
    Mutant("cpu", "bound", CPU_RING, "weights.need(j, projection_blocks, blocks);", "weights.need(j, projection_blocks, blocks - 1);", "a thread leaves out the last of the weights it packs"),
    Mutant("cpu", "barrier", CPU_RING, "? right.of(omp_get_thread_num()) - right.data : 0;\n    auto pack = [&](int64_t j, int64_t panel)",
           "? 0 : 0;\n    auto pack = [&](int64_t j, int64_t panel)", "threads pack their weights in one place"),
    Mutant("cpu", "bound", CPU_GEMM, "return strip < 0 ? 0 : smaller(", "return smaller(", "threads begin before a gradient's first strip"),
    Mutant("cpu", "bound", CPU_GEMM, "strip_at(work * (thread + 1) / threads)", "strip_at(work * (thread + 1) / (threads + 1))",
           "the last strips of gradients belong to no thread"),
    Mutant("cpu", "index", CPU_RING, "gate(i, d, smaller(kColumns<T>, D - d), sums_at<E>(attended, i, d));",
           "gate(i, d, smaller(kColumns<T>, D - d), sums_at<E>(attended, i, 0));", "a row's panels repeat the first one's attention (AMX)"),
    Mutant("cpu", "index", CPU_GEMM, "if (d >= D) d = 0, ++i;", "if (d > D) d = 0, ++i;", "rows of whole panels are followed by one of nothing each"),
    Mutant("cpu", "index", CPU_GEMM, "sums + (column / columns * kHeight<E> + i) * columns", "sums + (column / columns + i) * columns",
           "the panels of a tile's sums overlap (AMX)"),
    Mutant("cpu", "index", CPU_RING, "gradients.data + M + j * of_x", "gradients.data + M", "the gradients from x are those of the first modality alone"),
    Mutant("cpu", "index", CPU_GEMM, "(r / (per * lanes) * parts * height + i) * lanes;", "(r / (per * lanes) * parts * height) * lanes;",
           "half of a strip's columns lie where the others do (AMX)"),
    Mutant("cpu", "scale", CPU_LINEAR, "bias[s][i / lanes] = add_steps(bias[s][i / lanes], step);", "",
           "the bias has no gradient"),
    Mutant("cpu", "index", "csrc/cpu/dropout.inl", "philox(mask.seed, n, mask.stream, d, words + d);", "philox(mask.seed, n, mask.stream, d, words);",
           "the words of a row lie on top of each other"),
    # ---- an encoder's layer as one node, and derivatives of its gradients
    Mutant("cpu", "sign", ENCODER, "*needs[:3], qkv_bias.dtype, g_x, beside)", "*needs[:3], qkv_bias.dtype, None, beside)", "no gradient of x through the residual"),
    Mutant("cpu", "mask", ENCODER, "needs[7], False, None, g_y, beside)", "needs[7], False, None, None, beside)", "no gradient around the inner layer"),
    Mutant("cpu", "barrier", "ada2i_fast/cpu/__init__.py", "        yield\n        flush()\n", "        yield\n", "calls that wait are never made"),
    Mutant("cpu", "barrier", "ada2i_fast/ops/linear.py", "    cpu.flush()\n    return _relu(F.linear(x, weight, bias), relu)", "    return _relu(F.linear(x, weight, bias), relu)",
           "MKL reads what has not been computed yet"),
    Mutant("cpu", "index", "csrc/cpu/dispatch.cpp", "calls[i].function(calls[i].args, calls[i].size)", "calls[i].function(calls[0].args, calls[i].size)", "every call takes the first one's arguments"),
    Mutant("cpu", "index", ENCODER, "moments, p, seed, stream + heads + 2, **sums)", "moments, p, seed, stream + heads + 1, **sums)",
           "backward drops by the inner mask at the layer's end"),
    Mutant("cpu", "index", ENCODER, "at = (1e-5, 1e-5) if eps is None else eps[i], stream + i * (heads + 3)",
           "at = (1e-5, 1e-5) if eps is None else eps[i], stream", "all layers share their masks"),
    Mutant("cpu", "mask", "ada2i_fast/ops/dropout.py", "t if t is None else t.view_as(t) for t in tensors", "t for t in tensors",
           "derivatives of gradients count the way through the residual twice"),
    # ---- cosine_fusion
    Mutant("torch", "index", FUSION, "ratio = scores / scores.min()", "ratio = scores / scores.max()", "the ratio to the strongest modality"),
    Mutant("torch", "scale", FUSION, 'amw, cosine_norm, scale, "linear")[0]', 'amw, cosine_norm, 1.0, "linear")[0]', "no scale under create_graph"),
    Mutant("torch", "index", FUSION, "return None, None, None, None, None, None, *grads[-2:], *grads[:-2]",
           "return None, None, None, None, None, None, *grads[-2:], *grads[-3::-1]", "gradients of the modalities in reverse"),
    Mutant("cpu", "sign", CPU_FUSION, "load(u + i * width + d) - along * load(", "load(u + i * width + d) + along * load(",
           "the gradient's part along h is added"),
    Mutant("cpu", "scale", CPU_FUSION, "factor = T(args->scale) * inverse<T>(length);", "factor = inverse<T>(length);", "cosines without their scale"),
    Mutant("cpu", "scale", CPU_FUSION, "to_compute(bias[c]) / T(M)", "to_compute(bias[c])", "every modality adds the whole bias"),
    Mutant("cpu", "index", CPU_FUSION, "(const S*)args->tensors[M] + (c * M + m) * D; }", "(const S*)args->tensors[M] + (m * C + c) * D; }",
           "blocks of the weight are read as rows"),
    Mutant("cpu", "index", CPU_FUSION, "broadcast(logits[y * kFusionRows + i])", "broadcast(logits[y * kFusionRows])",
           "rows of a vector share their score"),
    Mutant("cpu", "index", CPU_FUSION, "total += load(to + part * partial.each + d);", "total += load(to + d);", "the first chunk stands for all"),
    Mutant("cpu", "bound", CPU_FUSION, "if (y >= 0 && y < C)", "if (y < C)", "negative labels are classes"),
    Mutant("cpu", "bound", CPU_FUSION, "const int64_t height = smaller(kFusionRows, last - first);", "const int64_t height = kFusionRows;",
           "blocks run beyond their chunk"),
    Mutant("cpu", "mask", CPU_FUSION, "args->amw && !(length < T(1e-12)) ?", "args->amw ?", "rows of no norm are projected"),
    Mutant("cpu", "mask", CPU_FUSION, "along = length < T(1e-12) ? Vector<T>{} : along;", "", "features of no norm are projected"),
    Mutant("cpu", "mask", CPU_FUSION, "const T along = norm[c] < T(1e-12) ? T(0) : sum<T>(dot);", "const T along = sum<T>(dot);",
           "classes of no norm are projected"),
    Mutant("cpu", "mask", CPU_FUSION, "if (m == 0) of_bias[c] += g;", "of_bias[c] += g;", "every modality adds to the gradient of the bias"),
    Mutant("cpu", "mask", CPU_FUSION, "scores[m] < weakest || scores[m] != scores[m]", "scores[m] < weakest", "a score that is NaN is overlooked"),
    # ---- CUDA C++, on the shim
    Mutant("cuda", "barrier", CUDA_TILE, "        __syncthreads();\n        if (k0 + D < end) fetch(k0 + D);", "        if (k0 + D < end) fetch(k0 + D);",
           "no barrier between filling the tile and multiplying"),
    Mutant("cuda", "barrier", CUDA_RING, "    __syncthreads();\n    const int64_t left = a.rows - row0;\n    sum_segments(",
           "    const int64_t left = a.rows - row0;\n    sum_segments(", "no barrier between writing u, v and summing them"),
    Mutant("cuda", "barrier", CUDA_MAPPING, "    __syncthreads();\n    return shared[0]", "    return shared[0]", "no barrier inside the block's sum"),
    Mutant("cuda", "sign", CUDA_RING, "v[e] * x[e] + t[e];", "v[e] * x[e] - t[e];", "sign of the target's gradient in g_att"),
    Mutant("cuda", "sign", CUDA_MAPPING, "difference[e] < 0.0f ? -1.0f : 0.0f", "difference[e] < 0.0f ? 1.0f : 0.0f", "the kept sign is never negative"),
    Mutant("cuda", "bound", CUDA_RING, "        if (n >= a.rows || valid <= 0) return;\n        float b[2], xs[2]",
           "        if (valid <= 0) return;\n        float b[2], xs[2]", "rows beyond the last are read and written"),
    Mutant("cuda", "scale", CUDA_RING, "w0[i] = a.scale * v[i];", "w0[i] = v[i];", "w without the attention scale"),
    Mutant("cuda", "index", CUDA_RING, "(65536u + r - 1) / r", "65536u / r", "the reciprocal that splits kk into (k, o) is rounded down"),
    Mutant("cuda", "index", CUDA_RING, "a.segment[j][(tile + b) * R * R + i] = sum;", "a.segment[j][tile * R * R + i] = sum;",
           "segments of a tile share a place"),
    Mutant("cuda", "barrier", CUDA_ADAM, "    __syncthreads();\n    return shared[0]", "    return shared[0]", "no barrier inside the block's sum of gradients"),
    Mutant("cuda", "barrier", CUDA_ADAM, "    __syncthreads();\n    if (threadIdx.x == 0) {\n        *a.norm", "    if (threadIdx.x == 0) {\n        *a.norm",
           "no barrier before the largest step is read"),
    Mutant("cuda", "bound", CUDA_ADAM, "e < left) {", "e < left + 1) {", "an element beyond the tensor counts among the deviations"),
    Mutant("cuda", "bound", CUDA_ADAM, "store<4>(m + d, valid, vector", "store<4>(m + d, left - at, vector", "partners of the last elements are written beyond the tensor"),
    Mutant("cuda", "index", CUDA_ADAM, "gridDim.x - 1 - blockIdx.x", "gridDim.x - blockIdx.x", "the first chunk is never updated"),
    Mutant("cuda", "sign", CUDA_ADAM, "(2.0 * rest + away * own)", "(2.0 * rest - away * own)", "deviations about the shift, not the mean"),
    Mutant("cuda", "scale", CUDA_ADAM, "away * away * elements(chunk)", "away * away", "chunks' means count once, not per element"),
    Mutant("cuda", "scale", CUDA_ADAM, "spread * k + 1e-8", "spread + 1e-8", "noise on gradients without the modulation's factor"),
    Mutant("cuda", "index", CUDA_ADAM, "at / 4 + kPairs / 4", "at / 4 + 1", "normals are paired with their neighbours"),
    Mutant("cuda", "index", CUDA_ADAM, "normal_octet(seed, a.number[tensor], step, first + at, noise)", "normal_octet(seed, a.number[tensor], step, at, noise)",
           "every chunk draws the noise of the first"),
    Mutant("cuda", "mask", CUDA_ADAM, "if (a.first_chunk[middle] <= chunk) low = middle;", "if (a.first_chunk[middle] < chunk) low = middle;",
           "a tensor's first chunk belongs to the one before"),
    # ---- the CPU's layer in one call, a node of autograd's graph in C++
    Mutant("node", "scale", NODE, "n ? 1.0 / n : 0.0", "n ? 1.0 / (n + 1) : 0.0", "the loss's mean over one element too many"),
    Mutant("node", "index", NODE, "for (int64_t i = 9 * m; i < 10 * m; ++i) p.add(tensors[i]);", "for (int64_t i = 10 * m; i < 11 * m; ++i) p.add(tensors[i]);",
           "backward takes the map's biases for its weights"),
    Mutant("node", "index", NODE, "impl->set_storage_offset(start);", "impl->set_storage_offset(0);", "every gradient begins where the first does"),
    Mutant("node", "index", NODE, "for (int64_t i = 0; i < 8 * m; i += 4) p.add(to", "for (int64_t i = 0; i < 8 * m; i += 4) p.add(i < 4 ? base : to",
           "the first projections' gradients go into the state"),
    Mutant("node", "bound", NODE, "end += (bytes[kind] + aligned - 1) / aligned * aligned;", "end += bytes[kind] / aligned * aligned;", "what the state holds overlaps"),
    Mutant("node", "bound", NODE, "at[layer.dialogues] == rows && std", "std", "offsets may end beyond the rows"),
    Mutant("node", "bound", NODE, "*to >= layer.m", "*to > layer.m", "a ring of modalities that are not there"),
    Mutant("node", "mask", NODES, "!t._fw_grad(0).defined()", "true", "derivatives of forward mode are lost"),
    Mutant("node", "mask", NODE, "if (graph && !with_loss) return py::none();", "", "a graph without a loss"),
    Mutant("node", "mask", NODES, "for (auto& s : saved) s.reset_data();", "", "backward twice through the same graph"),
    # On a GPU.
    Mutant("node", "scale", NODE, "a.keep_scale = float(1.0 / (1.0 - layer.dropout));", "a.keep_scale = 1.0f;", "on a GPU kept elements are not scaled up"),
    Mutant("node", "sign", NODE, "grad_x.add_(also_x);", "grad_x.sub_(also_x);", "on a GPU the loss's gradient of x is taken from the other one"),
    Mutant("node", "index", NODE, "(6 + kind) * m + j", "(6 + kind) * m", "on a GPU all modalities have the first one's maps"),
    Mutant("node", "index", NODE, "starts[Parameters::number(m, kind, j)]", "starts[Parameters::number(m, kind, 0)]",
           "on a GPU all gradients of parameters go to the first modality"),
    Mutant("node", "bound", NODE, "end += (layer.rows * layer.widths[j] + 255) / 256 * 256;", "end += layer.rows * layer.widths[j] / 256 * 256;",
           "on a GPU gradients of x overlap"),
    Mutant("node", "bound", NODE, "(layer.parameters == layer.dtype ? 8 : kParameters) * m", "8 * m", "on a GPU float32 maps are read as 16 bits"),
    Mutant("node", "mask", NODE, "ring.gated_target ? ring.target[j] : ring.attention[j]", "ring.attention[j]",
           "on a GPU the loss compares with the other target"),
    Mutant("node", "mask", NODE, "const bool loss = grads[m].defined();\n  const int64_t wanted", "const bool loss = true;\n  const int64_t wanted",
           "on a GPU the loss's gradient counts where there is none"),
    # ---- an encoder in one call
    Mutant("node", "sign", ENCODER_NODE, "into.add_(found)", "into.sub_(found)", "a product's gradient is taken from the other one"),
    Mutant("node", "scale", ENCODER_NODE, "-0.5);", "-0.25);", "scores divided by the fourth root"),
    Mutant("node", "index", ENCODER_NODE, "{stack, at + 1, at + 2, norm[1]}", "{stack, at, at + 2, norm[1]}", "the inner dropout has the outer one's mask"),
    Mutant("node", "index", ENCODER_NODE, "stream + i * (s.heads + 3)", "stream + i * s.heads", "layers share masks"),
    Mutant("node", "index", ENCODER_NODE, "norm.x, k[kT], &of", "k[kT].narrow(1, 0, s.width), k[kT], &of", "W_2's gradient from what it multiplied"),
    Mutant("node", "index", ENCODER_NODE, "  if (bias) *bias = at::sum", "  if (bias && weight) *bias = at::sum", "no gradient of b_qkv without W_qkv's"),
    Mutant("node", "bound", ENCODER_NODE, "return s.starts.back() == s.rows;", "return true;", "dialogues may end before the rows"),
    Mutant("node", "bound", ENCODER_NODE, "has_shape(inner[kOutWeight], width, inside)", "true", "W_2 of any shape"),
    Mutant("node", "bound", ENCODER_NODE, "needed[kWeight] || needed[kBias]", "needed[kWeight]", "of W_qkv's bias alone no gradient"),
    Mutant("node", "mask", ENCODER_NODE, "s.dtype == at::kFloat || by == kRounds", "s.dtype == at::kFloat", "a weight that the library rounds comes rounded"),
    Mutant("node", "scale", ENCODER_NODE, "const bool adds = into.defined() && g.scalar_type() == at::kFloat;", "const bool adds = into.defined();", "16 bits are added to floats as they lie"),
    Mutant("node", "mask", ENCODER_NODE, "if (codes.size() != ", "if (codes.size() > ", "products are done before it is known by whom"),
    # ---- the optimiser's tensors
    Mutant("node", "index", ADAM_NODE, "point({&params, &grads, &exp_avg, &exp_avg_sq});", "point({&params, &grads, &exp_avg_sq, &exp_avg});", "the moments change places"),
    Mutant("node", "mask", ADAM_NODE, "PyDict_GetItem(of, step) != PyList_GET_ITEM(steps.ptr(), at)", "!PyDict_GetItem(of, step)", "another step's state counts as the table's"),
    Mutant("node", "bound", ADAM_NODE, "if (found->sizes.size() != count) return py::none();", "", "a table of more parameters than have a gradient"),
    Mutant("node", "mask", ADAM_NODE, "t.unsafeGetTensorImpl()->bump_version();", "(void)t;", "a graph does not notice a step"),
]

# Backend: (build or None, tests, seconds for one run). Commands run in the copy. Triton has a runner of its own.
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
BUILD = [sys.executable, "-c", "from pathlib import Path; from build_tools import native; "
         "native.build(Path('ada2i_fast/lib').resolve(), Path('build/native').resolve())"]
BACKENDS = {
    "torch": (None, [*PYTEST, "tests/modules", "tests/ops/test_dropout.py", "tests/ops/test_afw_layer.py", "tests/test_model.py",
                     "tests/ops/test_attention_mapping.py", "tests/ops/test_tensor_ring.py", "tests/ops/test_cosine_fusion.py"], 600),
    "cpu": (BUILD, [*PYTEST, *(f"tests/ops/test_{op}.py" for op in (
        "afw_layer", "tensor_ring", "attention_mapping", "cosine_fusion", "linear", "dropout_fused", "dialogue_attention", "encoder_layer",
        "balanced_adam"))], 600),
    "cuda": (None, [*PYTEST, "tests/cuda_shim/test_kernels.py"], 900),
    "node": (BUILD, [*PYTEST, "tests/ops/test_encoder_layer.py", "tests/ops/test_afw_layer.py", "tests/test_optim.py", "-k", "node or notices"], 600),
}
LIBRARIES = {"cpu": "cpu", "node": "torch"}
NAMES = (*BACKENDS, "triton")


def triton_script():
    """tests/kernels/mutations.py as a module."""
    spec = importlib.util.spec_from_file_location("triton_mutations", ROOT / "tests" / "kernels" / "mutations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def triton_mutants() -> list[tuple[Mutant, list[str]]]:
    """With the cases to run."""
    return [(Mutant("triton", kind, f"kernels/{file}", old, new, shown(old, new)), cases)
            for kind, file, old, new, cases in triton_script().MUTATIONS]


def shown(old: str, new: str) -> str:
    """The first line that changes, before and after."""
    for before, after in zip(old.splitlines(), new.splitlines()):
        if before != after:
            return f"`{before.strip()}` becomes `{after.strip()}`"
    return f"`{old.splitlines()[-1].strip()}` goes"


def misfits() -> list[str]:
    """Mutants whose text does not occur exactly once in its file."""
    found = []
    for m in [*MUTANTS, *(mutant for mutant, _ in triton_mutants())]:
        path = ROOT / m.file
        count = path.read_text().count(m.old) if path.exists() else 0
        if count != 1:
            found.append(f"{m.backend}: {m.what}: found {count} times, not once, in {m.file}: {m.old!r}")
    return found


def copy_tree(target: Path) -> None:
    """What git would commit, new files included, and the built libraries."""
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True,
                           text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():         # a file removed but not yet committed is listed too
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for name in ("ada2i_fast/lib", "build/native"):
        if (ROOT / name).is_dir() and not (target / name).exists():
            shutil.copytree(ROOT / name, target / name)
    (target / "ada2i_fast" / "kernels").symlink_to("../kernels")        # as the installed package has it


def mutated_tiers() -> str:
    """The best tier that this processor has, beside the baseline: the others hold the same sources, and take as long to build."""
    from ada2i_fast import cpu
    return "" if cpu.why_not() else cpu.tiers()[0]


def environment(copy: Path, backend: str) -> dict[str, str]:
    temporary = copy.parent / "tmp"         # compilers' and tests' caches: gone with the copy
    temporary.mkdir(exist_ok=True)
    # The CUDA library is not under test here, and nvcc is slow; a mutant of C++ is compiled in a third of the time with -O1; HYPOTHESIS: no example database of an earlier mutant.
    return {**os.environ, "PYTHONPATH": str(copy), "TMPDIR": str(temporary), "ADA2I_FAST_CUDA": "0", "ADA2I_FAST_TORCH": str(int(backend == "node")), "ADA2I_FAST_CPU_TIERS": mutated_tiers(), "CXXFLAGS": "-O1", "PYTHONDONTWRITEBYTECODE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(temporary / "inductor"),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(temporary / "hypothesis")}


def run(command: list[str], copy: Path, backend: str, limit: float) -> tuple[str, str]:
    """("passed" | "failed" | "crashed" | "timeout" | "not run", the line that says why)."""
    process = subprocess.Popen(command, cwd=copy, env=environment(copy, backend), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", start_new_session=True)
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)      # its own session: the children too
        process.communicate()
        return "timeout", f"longer than {limit:.0f} s"
    lines = output.strip().splitlines() or [""]
    if process.returncode < 0:
        return "crashed", signal.Signals(-process.returncode).name
    if "pytest" in command:
        if process.returncode == 0:
            return "passed", lines[-1]
        if process.returncode == 1:
            return "failed", next((line.split(" - ")[0].removeprefix("FAILED ").removeprefix("ERROR ") for line in lines
                                   if line.startswith(("FAILED ", "ERROR "))), lines[-1])
        return "not run", lines[-1]
    return ("passed" if process.returncode == 0 else "not run"), lines[-1]


def clear_bytecode(copy: Path) -> None:
    for folder in copy.rglob("__pycache__"):
        shutil.rmtree(folder, ignore_errors=True)


def run_backend(backend: str, mutants: list[Mutant], deadline: float) -> list[tuple[Mutant, str, str]]:
    build, tests, limit = BACKENDS[backend]
    with tempfile.TemporaryDirectory(prefix="ada2i_mutations_") as folder:
        copy = Path(folder) / "tree"
        copy_tree(copy)
        clear_bytecode(copy)

        def attempt(file: str = "") -> tuple[str, str]:
            if build:
                state, why = run(build, copy, backend, 900)
                if state != "passed":
                    return "not run", f"does not build: {why}"
                info = json.loads((copy / "ada2i_fast" / "lib" / "build_info.json").read_text())[LIBRARIES[backend]]
                if not info["library"]:
                    return "not run", f"does not build: {info['reason'][:200]}"
            own = Path(file).stem.removesuffix("_fused")             # the op's own tests first: they tell soonest
            return run(sorted(tests, key=lambda word: word.startswith("tests/") and not (own and own in word)), copy, backend, limit)

        start = time.time()
        state, why = attempt()
        print(f"{backend}: unbroken: {state} ({why}), {time.time() - start:.0f} s", flush=True)
        if state != "passed":
            raise SystemExit(2)
        results = []
        for mutant in mutants:
            if time.time() > deadline:
                break
            path, start = copy / mutant.file, time.time()
            text = path.read_text()
            if text.count(mutant.old) != 1:
                print(f"{mutant.what}: its text changed since the start", file=sys.stderr)
                raise SystemExit(2)
            path.write_text(text.replace(mutant.old, mutant.new))
            try:
                state, why = attempt(mutant.file)
            finally:
                path.write_text(text)
            verdict = {"passed": "SURVIVED", "not run": "not run"}.get(state, "caught")
            print(f"{backend}: {mutant.kind}: {mutant.what}: {verdict}, {state} ({why}), {time.time() - start:.0f} s", flush=True)
            results.append((mutant, verdict, why if state == "failed" else f"{state}: {why}"))
        return results


def run_triton(mutants: list[tuple[Mutant, list[str]]]) -> list[tuple[Mutant, str, str]]:
    """On copies of kernels/ only, the cases in processes of their own."""
    script, results = triton_script(), []
    first = mutants[0][0] if mutants else None
    every = list(dict.fromkeys(case for _, cases in mutants for case in cases))
    if first and (why := script.caught_by(Path(first.file).name, first.old, first.old, every)):
        print(f"triton: unbroken: {why}", file=sys.stderr)
        raise SystemExit(2)
    print("triton: unbroken: passed", flush=True)
    for mutant, cases in mutants:
        start = time.time()
        why = script.caught_by(Path(mutant.file).name, mutant.old, mutant.new, cases)
        verdict = "caught" if why else "SURVIVED"
        print(f"triton: {mutant.kind}: {mutant.what}: {verdict} ({why}), {time.time() - start:.0f} s", flush=True)
        results.append((mutant, verdict, why or ", ".join(cases)))
    return results


def sections(page: str) -> dict[str, str]:
    """The page's sections by backend, without the headings."""
    return {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1].strip() for part in page.split("\n## ")[1:]}


def write_page(results: dict[str, list[tuple[Mutant, str, str]]]) -> None:
    old = sections(PAGE.read_text()) if PAGE.exists() else {}
    lines = ["# Mutations", "",
             "Generated by `python tests/mutations.py`: each line breaks one thing in a copy of the tree and runs the backend's tests. "
             "The last column is the first test that failed.", ""]
    for backend in NAMES:
        if backend in results:
            rows = results[backend]
            caught = sum(verdict == "caught" for _, verdict, _ in rows)
            others = len(triton_mutants() if backend == "triton" else [m for m in MUTANTS if m.backend == backend]) - len(rows)
            body = [f"{caught} of {len(rows)} caught." + (f" {others} more did not run." if others else ""), "", "| kind | file | what is broken | result | by |", "|---|---|---|---|---|"]
            for m, verdict, why in rows:
                shown = why.replace("|", "/").replace("`", "'")
                body.append(f"| {m.kind} | `{m.file}` | {m.what} | {verdict if verdict == 'caught' else f'**{verdict}**'} | {shown[:120]} |")
            lines += [f"## {backend}", "", *body, ""]
        elif backend in old:
            lines += [f"## {backend}", "", old[backend], ""]
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="*", metavar="backend", help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", help="a word in the kind or the description; the page is not written then")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no mutant of a C++ or PyTorch backend after so many")
    arguments = parser.parse_args()
    deadline = time.time() + 60 * arguments.minutes
    unknown = set(arguments.backends) - set(NAMES)
    if unknown:
        parser.error(f"backend: expected some of {', '.join(NAMES)}, got {', '.join(unknown)}")
    if bad := misfits():
        print("\n".join(bad), file=sys.stderr)
        return 2
    if arguments.check:
        print(f"all {len(MUTANTS) + len(triton_mutants())} mutants fit")
        return 0
    results = {}
    def wanted(m: Mutant) -> bool:
        return not arguments.only or arguments.only in f"{m.kind} {m.what}"

    for backend in arguments.backends or NAMES:
        if backend == "triton":
            results[backend] = run_triton([(m, cases) for m, cases in triton_mutants() if wanted(m)])
        else:
            results[backend] = run_backend(backend, [m for m in MUTANTS if m.backend == backend and wanted(m)], deadline)
        if not arguments.only:
            write_page(results)
    return int(any(verdict != "caught" for rows in results.values() for _, verdict, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
