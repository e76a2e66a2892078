// A linear map of rows in bf16 by a weight in float, which is rounded where it is packed, and its gradients, those of the parameters in
// float; ada2i_fast/ops/linear.py says when.

// The size of groups of `count` pieces: as many groups for each thread, none larger than `most`.
INLINE int64_t group_size(int64_t count, int64_t threads, int64_t most) {
  const int64_t turns = (count + threads * most - 1) / (threads * most);
  return turns ? (count + threads * turns - 1) / (threads * turns) : 1;
}

constexpr int kMostPanels = 4;     // panels of the weight that one job packs side by side: a row's share is some cache lines

//   x weight bias (null: none) | out
//
// transposed: out = x W^T + b for W [outputs, inputs]; else out [rows, inputs] = x W for x [rows, outputs].
template <class S, bool transposed> static int linear_product(const Linear* args) {
  using E = Operand<S>;
  constexpr int per = Step<E>::elements, lanes = Lanes<float>::count, columns = kColumns<float>;
  const int64_t rows = args->rows, k = transposed ? args->inputs : args->outputs, n = transposed ? args->outputs : args->inputs;
  const S* x = (const S*)args->tensors[0];
  const float *weight = (const float*)args->tensors[1], *bias = (const float*)args->tensors[2];
  S* out = (S*)args->tensors[3];
  const int threads = useful_threads(args->threads, rows * k * n);
  const int64_t strips = (rows + kHeight<E> - 1) / kHeight<E>, each = left_size<E>(k);
  const int64_t panels = (n + columns - 1) / columns, together = group_size(panels, threads, kMostPanels), groups = (panels + together - 1) / together;
  Scratch<E> left(strips * each), right(right_size<E>(k, together * columns), threads);
  Scratch<float> sums(sums_size<E>(together * columns), threads);
  if (!left.ok() || !right.ok() || !sums.ok()) return 1;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t strip = 0; strip < strips; ++strip)
      pack_left_rows(left.data + strip * each, x + strip * kHeight<E> * k, k, smaller(kHeight<E>, rows - strip * kHeight<E>));
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < groups; ++group) {
      E* own = right.of(omp_get_thread_num());
      const int64_t first = group * together * columns, width = smaller(together * columns, n - first);
      if (transposed) {
        for (int64_t column = 0; column < width; column += columns)
          pack_transposed(own, [&](int64_t r) { return weight + (first + r) * k; }, k, width, column);
      } else {
        for (int64_t r = 0; r < k; r += per) {
          const float* row = weight + r * n + first;
          // Rows lie pages apart, and the processor does not see the next one coming.
          for (int64_t ahead = 8; ahead < 8 + per && r + ahead < k; ++ahead)
            for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(row + ahead * n + d);
          pack_right(own, r, k, width, row, r + 1 < k ? row + n : nullptr, false);
        }
      }
      multiply_all(left.data, each, strips, own, k, width, sums.of(omp_get_thread_num()), [&](int64_t strip, const float* c, int64_t column, int64_t there) {
        const int64_t height = smaller(kHeight<E>, rows - strip * kHeight<E>);
        S* to = out + strip * kHeight<E> * n + first + column;
        for (int64_t v = 0; v < there; v += lanes) {
          const auto more = bias ? load(bias + first + column + v, there - v) : Vector<float>{};
          for (int64_t i = 0; i < height; ++i) store(to + i * n + v, load(c + i * columns + v) + more, there - v);
        }
      });
    }
  }
  return 0;
}
template <class S> static int linear_forward(const Linear* args) { return linear_product<S, true>(args); }
template <class S> static int linear_input(const Linear* args) { return linear_product<S, false>(args); }

constexpr int64_t kDepth = 640;    // rows of the batch per pass, about: a strip and a panel of so many stay near the first-level cache
// Strips of kHeight outputs that one job packs side by side: a row's share is a few cache lines.
template <class E> constexpr int kMostStrips = 96 / kHeight<E> < 8 ? 96 / kHeight<E> : 8;

//   grad_out x | grad_weight grad_bias (null: none)
//
// Rows are summed in their order, whatever the number of threads: threads divide the outputs.
template <class S> static int linear_backward(const Linear* args) {
  using E = Operand<S>;
  using U = typename Step<E>::type;
  constexpr int per = Step<E>::elements, lanes = Lanes<float>::count;
  const int64_t rows = args->rows, m = args->outputs, n = args->inputs;
  const S *grad_out = (const S*)args->tensors[0], *x = (const S*)args->tensors[1];
  float *grad_weight = (float*)args->tensors[2], *grad_bias = (float*)args->tensors[3];
  if (m == 0) return 0;
  const int threads = useful_threads(args->threads, rows * m * n);
  const int64_t passes = rows > kDepth ? (rows + kDepth - 1) / kDepth : 1, depth = round_up(rows / passes + 1, kBlock);
  const int64_t strips = (m + kHeight<E> - 1) / kHeight<E>, together = group_size(strips, threads, kMostStrips<E>);
  const int64_t groups = (strips + together - 1) / together;
  const int64_t each = left_size<E>(depth);           // whole vectors are stored, so the last step of a strip writes past its end
  Scratch<E> right(right_size<E>(depth, n)), left(together * each, threads);
  if (!right.ok() || !left.ok()) return 1;
#pragma omp parallel num_threads(threads)
  for (int64_t start = 0; start == 0 || start < rows; start += depth) {
    const int64_t k = smaller(depth, rows - start);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (k + kBlock - 1) / kBlock; ++block)
      for (int64_t r = block * kBlock; r < smaller((block + 1) * kBlock, k); r += per) {
        const S* row = x + (start + r) * n;
        pack_right(right.data, r, k, n, row, r + 1 < k ? row + n : nullptr, false);
      }
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < groups; ++group) {
      E* own = left.of(omp_get_thread_num());
      const int64_t first = group * together * kHeight<E>, used = smaller(together, strips - group * together);
      Vector<float> bias[kMostStrips<E>][(kHeight<E> + lanes - 1) / lanes] = {};
      pack_left_columns(own, each, grad_out + start * m + first, m, m - first, k, used, [&](int64_t s, int i, Vector<U> step) __attribute__((always_inline)) {
        bias[s][i / lanes] = multiply_add(bias[s][i / lanes], Step<E>::one, step);
      });
      if (grad_bias)
        for (int64_t s = 0; s < used; ++s)
          for (int i = 0; i < kHeight<E>; i += lanes) {
            float* to = grad_bias + first + s * kHeight<E> + i;
            const int64_t there = smaller(kHeight<E> - i, m - first - s * kHeight<E> - i);
            if (there > 0) store(to, start > 0 ? bias[s][i / lanes] + load(to, there) : bias[s][i / lanes], there);
          }
      for (int64_t s = 0; s < used; ++s) {
        const int64_t d = first + s * kHeight<E>, height = smaller(kHeight<E>, m - d);
        multiply<Columns>(own + s * each, right.data, k, n, [&](const float* c, int64_t column, int64_t there) {
          for (int i = 0; i < height; ++i)
            for (int64_t v = 0; v < there; v += lanes) {
              float* to = grad_weight + (d + i) * n + column + v;
              auto value = load(c + i * kColumns<float> + v);
              store(to, start > 0 ? value + load(to, there - v) : value, there - v);
            }
        });
      }
    }
  }
  return 0;
}
