// The gradients of a linear map's parameters, float from gradients and inputs in 16 bits; ada2i_fast/ops/linear.py says when.

constexpr int64_t kDepth = 640;    // rows of the batch per pass, about: a strip and a panel of so many stay near the first-level cache
constexpr int kMostStrips = 8;     // strips of kRows outputs that one job packs side by side: a row's share is a few cache lines

//   grad_out x | grad_weight grad_bias (null: none)
//
// Rows are summed in their order, whatever the number of threads: threads divide the outputs.
template <class S> static int linear_backward(const Linear* args) {
  using E = Operand<S>;
  using U = typename Step<E>::type;
  constexpr int per = Step<E>::elements, lanes = Lanes<float>::count, columns = kColumns<float>;
  const int64_t rows = args->rows, m = args->outputs, n = args->inputs;
  const S *grad_out = (const S*)args->tensors[0], *x = (const S*)args->tensors[1];
  float *grad_weight = (float*)args->tensors[2], *grad_bias = (float*)args->tensors[3];
  if (m == 0) return 0;
  const int threads = useful_threads(args->threads, rows * m * n);
  const int64_t passes = rows > kDepth ? (rows + kDepth - 1) / kDepth : 1, depth = round_up(rows / passes + 1, kBlock);
  // As many groups of strips for each thread, none larger than kMostStrips.
  const int64_t strips = (m + kRows - 1) / kRows, turns = (strips + threads * kMostStrips - 1) / (threads * kMostStrips);
  const int64_t together = (strips + threads * turns - 1) / (threads * turns), groups = (strips + together - 1) / together;
  const int64_t each = kRows * depth + 64;       // whole vectors are stored, so the last step of a strip writes past its end
  Scratch<E> right(right_size<E>(depth, n)), left(together * each, threads);
  if (!right.ok() || !left.ok()) return 1;
#pragma omp parallel num_threads(threads)
  for (int64_t start = 0; start == 0 || start < rows; start += depth) {
    const int64_t k = smaller(depth, rows - start), count = steps<E>(k);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (k + kBlock - 1) / kBlock; ++block)
      for (int64_t r = block * kBlock; r < smaller((block + 1) * kBlock, k); r += per) {
        const S* row = x + (start + r) * n;
        pack_right(right.data, r, k, n, row, r + 1 < k ? row + n : nullptr, false);
      }
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < groups; ++group) {
      E* own = left.of(omp_get_thread_num());
      const int64_t first = group * together * kRows, used = smaller(together, strips - group * together);
      Vector<float> bias[kMostStrips][(kRows + lanes - 1) / lanes] = {};
      for (int64_t r = 0; r < k; r += per) {
        const S* row = grad_out + (start + r) * m + first;
        const S* next = r + 1 < k ? row + m : nullptr;
        for (int64_t s = 0; s < used; ++s)
          for (int i = 0; i < kRows; i += lanes) {
            const int64_t at = s * kRows + i, there = m - first - at;
            auto step = row_step((U*)0, row + at, next ? next + at : nullptr, there > 0 ? there : 0);
            __builtin_memcpy((U*)(own + s * each) + r / per * kRows + i, &step, kBytes);
            bias[s][i / lanes] = multiply_add(bias[s][i / lanes], Step<E>::one, step);
          }
      }
      if (grad_bias)
        for (int64_t s = 0; s < used; ++s)
          for (int i = 0; i < kRows; i += lanes) {
            float* to = grad_bias + first + s * kRows + i;
            const int64_t there = smaller(kRows - i, m - first - s * kRows - i);
            if (there > 0) store(to, start > 0 ? bias[s][i / lanes] + load(to, there) : bias[s][i / lanes], there);
          }
      for (int64_t s = 0; s < used; ++s) {
        auto strip = (const U*)(own + s * each);
        const int64_t d = first + s * kRows;
        for (int64_t column = 0; column < n; column += columns) {
          alignas(64) float c[kRows * columns];
          auto panel = (const U*)right.data + column * count;
          if (n - column > lanes) micro_kernel<Columns, 2>(strip, panel, count, c);
          else micro_kernel<Columns, 1>(strip, panel, count, c);
          for (int i = 0; i < smaller(kRows, m - d); ++i)
            for (int v = 0; v < columns && column + v < n; v += lanes) {
              float* to = grad_weight + (d + i) * n + column + v;
              auto value = load(c + i * columns + v);
              store(to, start > 0 ? value + load(to, n - column - v) : value, n - column - v);
            }
        }
      }
    }
  }
  return 0;
}
