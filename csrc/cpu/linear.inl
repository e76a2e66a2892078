// A linear map of rows by a weight in float, which becomes an operand of the rows' type where it is packed, and its gradients, those of the
// parameters in float; ada2i_fast/ops/linear.py says when.

// The size of groups of `count` pieces: as many groups for each thread, none larger than `most`.
INLINE int64_t group_size(int64_t count, int64_t threads, int64_t most) {
  const int64_t turns = (count + threads * most - 1) / (threads * most);
  return turns ? (count + threads * turns - 1) / (threads * turns) : 1;
}

// What a job multiplies. Vectors take a few panels of the weight by all of the left operand, which all threads share. Tiles are faster than
// any cache but the first: a thread packs the left operand for itself, rows of the batch by elements of a row that stay in its second-level cache,
// and takes panel after panel for it. The sums wait, and go out as rows of some length: short pieces, far apart, take memory as long
// as the product takes.
template <class E> constexpr int64_t kRowsTogether = kTiles<E> ? 512 : 2048;
template <class E> constexpr int kMostPanels = kTiles<E> ? 16 : 4;
constexpr int kPackedPanels = 4;   // those packed side by side: a row's share is some cache lines
template <class E> INLINE int64_t elements_together(int64_t rows, int64_t k) {
  if (!kTiles<E> || rows == 0 || k == 0) return k > 0 ? k : 1;
  const int64_t most = (int64_t(400) << 10) / (2 * Step<E>::parts * round_up(rows, kHeight<E>)), passes = (k + most - 1) / most;
  return round_up((k + passes - 1) / passes, kStripLength<E>);
}
template <class E> INLINE int64_t sums_size(int64_t strips, int64_t n) { return kTiles<E> ? strips * kHeight<E> * round_up(n, kColumns<float>) : 0; }

// put(row, c, column) for each row of `strips` strips, with the sums of n columns, one panel after the other.
template <class F> INLINE void put_rows(const float* sums, int64_t strips, int64_t rows, int64_t n, F put) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < n; column += kColumns<float>) put(row, sums + column * strips * 32 + row * kColumns<float>, column);
}

//   x weight more (null: none) | out
//
// transposed: out = x W^T + more for W [outputs, inputs] and more [outputs] in float; else out = x W + more for x [rows, outputs] and out and
// more [rows, inputs], which may be one.
template <class S, bool transposed> static int linear_product(const Linear* args) {
  using E = Packed<S>;
  constexpr int per = Step<E>::elements, lanes = Lanes<float>::count, columns = kColumns<float>;
  const int64_t k = transposed ? args->inputs : args->outputs, n = transposed ? args->outputs : args->inputs;
  const S* x = (const S*)args->tensors[0];
  const float *weight = (const float*)args->tensors[1], *bias = transposed ? (const float*)args->tensors[2] : nullptr;
  const S* added = transposed ? nullptr : (const S*)args->tensors[2];
  S* out = (S*)args->tensors[3];
  const int threads = useful_threads(args->threads, args->rows * k * n);
  const int64_t most_rows = smaller(args->rows, kRowsTogether<E>), most_strips = (most_rows + kHeight<E> - 1) / kHeight<E>;
  const int64_t depth = elements_together<E>(most_rows, k), each = left_size<E>(depth);
  const int64_t panels = (n + columns - 1) / columns, together = group_size(panels, threads, kMostPanels<E>), groups = (panels + together - 1) / together;
  Scratch<E> left(most_strips * each, kTiles<E> ? threads : 1), right(right_size<E>(depth, kPackedPanels * columns), threads);
  Scratch<float> sums(sums_size<E>(most_strips, together * columns), threads);
  if (!left.ok() || !right.ok() || !sums.ok()) return 1;
#pragma omp parallel num_threads(threads)
  for (int64_t row = 0; row < args->rows; row += kRowsTogether<E>) {
    const int64_t rows = smaller(kRowsTogether<E>, args->rows - row), strips = (rows + kHeight<E> - 1) / kHeight<E>;
    auto pack_strip = [&](E* to, int64_t strip, int64_t start) {
      pack_left_rows(to + strip * each, x + (row + strip * kHeight<E>) * k + start, k, smaller(depth, k - start), smaller(kHeight<E>, rows - strip * kHeight<E>));
    };
    if (!kTiles<E>) {
#pragma omp for schedule(static)
      for (int64_t strip = 0; strip < strips; ++strip) pack_strip(left.data, strip, 0);
    }
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < groups; ++group) {
      const int thread = omp_get_thread_num();
      E *own = right.of(thread), *own_left = left.of(kTiles<E> ? thread : 0);
      const int64_t begin = group * together * columns, end = smaller(begin + together * columns, n);
      auto put = [&](int64_t r, const float* c, int64_t column) __attribute__((always_inline)) {
        const int64_t at = (row + r) * n + column;
        for (int64_t v = 0; v < smaller(columns, end - column); v += lanes) {
          const int64_t there = end - column - v;
          auto value = load(c + v);
          if (bias) value += load(bias + column + v, there);
          if (added) value += load(added + at + v, there);
          store(out + at + v, value, there);
        }
      };
      for (int64_t start = 0; start == 0 || start < k; start += depth) {
        const int64_t here = smaller(depth, k - start);
        if (kTiles<E>)
          for (int64_t strip = 0; strip < strips; ++strip) pack_strip(own_left, strip, start);
        for (int64_t first = begin; first < end; first += kPackedPanels * columns) {
          const int64_t width = smaller(kPackedPanels * columns, end - first);
          if (transposed) {
            for (int64_t column = 0; column < width; column += columns)
              pack_transposed(own, [&](int64_t r) { return weight + (first + r) * k + start; }, here, width, column);
          } else {
            for (int64_t r = 0; r < here; r += per) {
              const float* from = weight + (start + r) * n + first;
              // Rows lie pages apart, and the processor does not see the next one coming.
              for (int64_t ahead = 8; ahead < 8 + per && r + ahead < here; ++ahead)
                for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(from + ahead * n + d);
              pack_right(own, r, here, width, from, r + 1 < here ? from + n : nullptr, false);
            }
          }
          if constexpr (kTiles<E>)
            multiply_strips(own_left, each, strips, own, here, width, sums.of(thread) + sums_size<E>(strips, first - begin), start > 0);
          else
            for (int64_t strip = 0; strip < strips; ++strip)
              multiply<Strips>(own_left + strip * each, own, here, width, [&](const float* c, int64_t column, int64_t) {
                for (int64_t i = 0; i < smaller(kHeight<E>, rows - strip * kHeight<E>); ++i) put(strip * kHeight<E> + i, c + i * columns, first + column);
              });
        }
      }
      if (kTiles<E>) put_rows(sums.of(thread), strips, rows, end - begin, [&](int64_t r, const float* c, int64_t column) { put(r, c, begin + column); });
    }
  }
  return 0;
}
template <class S> static int linear_forward(const Linear* args) { return linear_product<S, true>(args); }
template <class S> static int linear_input(const Linear* args) { return linear_product<S, false>(args); }

constexpr int64_t kColumnsTogether = 256;   // of the tiles' results, which go out as rows
constexpr int64_t kDepth = 640;    // rows of the batch per pass, about: a strip and a panel of so many stay near the first-level cache
// Strips of kHeight outputs that one job packs side by side: a row's share is a few cache lines.
constexpr int kMostStrips = 8;

//   grad_out x | grad_weight grad_bias (null: none)
//
// Rows are summed in their order, whatever the number of threads: threads divide the outputs.
template <class S> static int linear_backward(const Linear* args) {
  using E = Packed<S>;
  constexpr int per = Step<E>::elements, lanes = Lanes<float>::count, columns = kColumns<float>;
  const int64_t rows = args->rows, m = args->outputs, n = args->inputs;
  const S *grad_out = (const S*)args->tensors[0], *x = (const S*)args->tensors[1];
  float *grad_weight = (float*)args->tensors[2], *grad_bias = (float*)args->tensors[3];
  if (m == 0) return 0;
  const int threads = useful_threads(args->threads, rows * m * n);
  const int64_t passes = rows > kDepth ? (rows + kDepth - 1) / kDepth : 1, depth = round_up(rows / passes + 1, kBlock);
  const int64_t strips = (m + kHeight<E> - 1) / kHeight<E>, together = group_size(strips, threads, kMostStrips);
  const int64_t groups = (strips + together - 1) / together;
  const int64_t each = left_size<E>(depth);           // whole vectors are stored, so the last step of a strip writes past its end
  Scratch<E> right(right_size<E>(depth, n)), left(together * each, threads);
  Scratch<float> sums(sums_size<E>(together, kColumnsTogether), threads);
  if (!right.ok() || !left.ok() || !sums.ok()) return 1;
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
      Vector<float> bias[kMostStrips][(kHeight<E> + lanes - 1) / lanes] = {};
      pack_left_columns(own, each, grad_out + start * m + first, m, m - first, k, used, [&](int64_t s, int i, auto step) __attribute__((always_inline)) {
        bias[s][i / lanes] = add_steps(bias[s][i / lanes], step);
      });
      if (grad_bias)
        for (int64_t s = 0; s < used; ++s)
          for (int i = 0; i < kHeight<E>; i += lanes) {
            float* to = grad_bias + first + s * kHeight<E> + i;
            const int64_t there = smaller(kHeight<E> - i, m - first - s * kHeight<E> - i);
            if (there > 0) store(to, start > 0 ? bias[s][i / lanes] + load(to, there) : bias[s][i / lanes], there);
          }
      auto put = [&](int64_t r, const float* c, int64_t column) __attribute__((always_inline)) {
        float* to = grad_weight + (first + r) * n + column;
        for (int64_t v = 0; v < smaller(columns, n - column); v += lanes)
          store(to + v, start > 0 ? load(c + v) + load(to + v, n - column - v) : load(c + v), n - column - v);
      };
      if constexpr (kTiles<E>) {
        float* sum = sums.of(omp_get_thread_num());
        for (int64_t begin = 0; begin < n; begin += kColumnsTogether) {
          const int64_t width = smaller(kColumnsTogether, n - begin);
          multiply_strips(own, each, used, right.data + begin * padded_steps<E>(k) * per, k, width, sum, false);
          put_rows(sum, used, smaller(used * kHeight<E>, m - first), width, [&](int64_t r, const float* c, int64_t column) { put(r, c, begin + column); });
        }
      } else {
        for (int64_t s = 0; s < used; ++s)
          multiply<Columns>(own + s * each, right.data, k, n, [&](const float* c, int64_t column, int64_t) {
            for (int64_t i = 0; i < smaller(kHeight<E>, m - first - s * kHeight<E>); ++i) put(s * kHeight<E> + i, c + i * columns, column);
          });
      }
    }
  }
  return 0;
}
