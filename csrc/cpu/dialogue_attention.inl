// Self-attention inside each dialogue; mathematics in ada2i_fast/ops/dialogue_attention.py. S is the storage type, arithmetic is in float.
// Where the tier has the bf16 dot product, bf16 is multiplied as it stands; weights and gradients of scores are rounded to it for that.
// A job is one head of one dialogue. Its scores exist for kRows queries at a time forward and for kQueries backward, so memory is linear
// in the rows.

constexpr int64_t kQueries = 8 * kRows;

// ---- products -----------------------------------------------------------------------------------------------------------------

// A matrix in panels of kColumns columns, [panel][rows][kColumns]: a right operand (steps are the rows), a left one as it stands or as its
// transpose, and a result. So float scores and their gradients go from product to product without a copy. U: float, or the two bf16 of a
// step, which are neighbours in a row where the columns are steps and in a column where the rows are.
template <class U> struct Panels {
  static constexpr int columns = kColumns<float>;
  U* data;
  int64_t rows;
  static int64_t size(int64_t rows, int64_t width) { return rows * round_up(width, columns); }
  int64_t chunk() const { return rows * columns; }
  U* at(int64_t row, int64_t column) const { return data + column / columns * chunk() + row * columns + column % columns; }
  void put(int64_t row, int64_t column, Vector<U> value) const { __builtin_memcpy(at(row, column), &value, kBytes); }
};

constexpr int kThird = kRows / 3;   // heights of a tile are multiples: short dialogues multiply little padding

// out[height][width vectors] (+)= left * right over `count` steps. A panel of the left operand is `chunk` steps.
template <bool transposed, int height, int width, class U>
static __attribute__((noinline)) void panel_kernel(const U* left, int64_t chunk, const U* right, int64_t count, float* out, bool add) {
  constexpr int lanes = Lanes<float>::count, columns = kColumns<float>;
  Vector<float> total[height][width] = {};
  if (add)
#pragma GCC unroll 16
    for (int i = 0; i < height; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < width; ++v) total[i][v] = load(out + i * columns + v * lanes);
  auto step = [&](int k) __attribute__((always_inline)) {
    Vector<U> b[width];
    for (int v = 0; v < width; ++v) __builtin_memcpy(&b[v], right + v * lanes, kBytes);
#pragma GCC unroll 16
    for (int i = 0; i < height; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < width; ++v) total[i][v] = multiply_add(total[i][v], left[transposed ? i : i * columns + k], b[v]);
    right += columns;
  };
  if (transposed) {
    for (; count > 0; --count, left += columns) step(0);
  } else {
    for (; count >= columns; count -= columns, left += chunk)
      for (int k = 0; k < columns; ++k) step(k);
    for (int k = 0; k < count; ++k) step(k);
  }
#pragma GCC unroll 16
  for (int i = 0; i < height; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < width; ++v) store(out + i * columns + v * lanes, total[i][v]);
}

// Rows row .. row + height - 1 of out, n columns, = rows first .. first + height - 1 of left, or of its transpose, times right, over `count`
// steps; or they are added. height is at most kRows, and is rounded up to a multiple of kThird.
template <bool transposed, class U>
INLINE void product(Panels<U> left, int64_t first, int64_t height, Panels<U> right, int64_t count, int64_t n, Panels<float> out, int64_t row,
                    bool add) {
  typedef void Kernel(const U*, int64_t, const U*, int64_t, float*, bool);
  static Kernel* const kernels[3][2] = {{panel_kernel<transposed, kThird, 1, U>, panel_kernel<transposed, kThird, 2, U>},
                                        {panel_kernel<transposed, 2 * kThird, 1, U>, panel_kernel<transposed, 2 * kThird, 2, U>},
                                        {panel_kernel<transposed, 3 * kThird, 1, U>, panel_kernel<transposed, 3 * kThird, 2, U>}};
  const U* from = transposed ? left.at(0, first) : left.at(first, 0);
  for (int64_t column = 0; column < n; column += kColumns<float>)
    kernels[(height - 1) / kThird][n - column > Lanes<float>::count](from, left.chunk(), right.at(0, column), count, out.at(row, column), add);
}

// out [n, width] (+)= left^T right, for the first `count` steps of left [.., n] and right [.., width].
template <class U>
INLINE void product_of_transpose(Panels<U> left, int64_t n, Panels<U> right, int64_t count, int64_t width, Panels<float> out, bool add) {
  for (int64_t first = 0, height; first < n; first += height) {
    height = smaller(smaller(kRows, n - first), kColumns<float> - first % kColumns<float>);
    product<true>(left, first, height, right, count, width, out, first, add);
  }
}

// `count` rows of `width` numbers whose columns are steps. Rows that only fill a tile are zero.
template <class U, class S> INLINE void pack_rows(Panels<U> to, const S* rows, int64_t stride, int64_t count, int64_t width) {
  constexpr int lanes = Lanes<U>::count, per = sizeof(U) / sizeof(Operand<S>);
  for (int64_t r = 0; r < round_up(count, kThird); ++r)
    for (int64_t d = 0; d < width; d += lanes * per)
      to.put(r, d / per, r < count ? steps_at((Operand<S>*)0, rows + r * stride + d, width - d).part[0] : Vector<U>{});
}

// The same where the rows are steps.
template <class U, class S> INLINE void pack_steps(Panels<U> to, const S* rows, int64_t stride, int64_t count, int64_t width) {
  constexpr int lanes = Lanes<U>::count, per = sizeof(U) / sizeof(Operand<S>);
  for (int64_t r = 0; r < count; r += per) {
    const S *row = rows + r * stride, *next = r + 1 < count ? row + stride : nullptr;
    for (int64_t d = 0; d < width; d += lanes) to.put(r / per, d, row_step((Operand<S>*)0, row + d, next ? next + d : nullptr, width - d).part[0]);
  }
}

// Their transpose, whose columns are the rows; to.rows is a multiple of the lanes.
template <class U, class S> INLINE void pack_columns(Panels<U> to, const S* rows, int64_t stride, int64_t count, int64_t width) {
  constexpr int lanes = Lanes<U>::count, per = sizeof(U) / sizeof(Operand<S>);
  for (int64_t r = 0; r < count; r += lanes)
    for (int64_t d = 0; d < width; d += lanes * per) {
      Vector<U> square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) square[i] = r + i < count ? steps_at((Operand<S>*)0, rows + (r + i) * stride + d, width - d).part[0] : Vector<U>{};
      transpose_square<U>(square);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) to.put(d / per + i, r, square[i]);
    }
}

// value in the first n lanes, `other` in the rest.
INLINE Vector<float> first_lanes(Vector<float> value, int64_t n, float other) {
  Vector<int32_t> lane;
  for (int i = 0; i < Lanes<float>::count; ++i) lane[i] = i;
  return lane < int32_t(n) ? value : broadcast(other);
}

// Left operands from the first `height` rows of a tile of n columns: as it stands, and its transpose from step row / 2 on.
#if defined(__AVX512BF16__)
INLINE void round_tile(Panels<uint32_t> to, Panels<float> tile, int64_t height, int64_t n) {
  for (int64_t i = 0; i < height; ++i)
    for (int64_t d = 0; d < n; d += 32) {
      const auto low = first_lanes(load(tile.at(i, d)), n - d, 0.0f);
      const auto high = n - d > 16 ? first_lanes(load(tile.at(i, d + 16)), n - d - 16, 0.0f) : Vector<float>{};
      to.put(i, d / 2, rounded(low, high));
    }
}
INLINE void round_transposed(Panels<uint32_t> to, int64_t row, Panels<float> tile, int64_t height, int64_t n) {
  for (int64_t i = 0; i < height; i += 2)
    for (int64_t d = 0; d < n; d += 16)
      to.put((row + i) / 2, d, row_step((bf16*)0, (const float*)tile.at(i, d), i + 1 < height ? (const float*)tile.at(i + 1, d) : nullptr, 16).part[0]);
}
#endif

// ---- rows of a tile -----------------------------------------------------------------------------------------------------------

constexpr int kTileLanes = (kRows + Lanes<float>::count - 1) / Lanes<float>::count * Lanes<float>::count;   // one per row, in whole vectors

// Lane i is the largest of row i, found as row_sums finds the sum. Overwrites the rows.
INLINE Vector<float> row_maxima(Vector<float>* rows) {
#pragma GCC unroll 4
  for (int width = Lanes<float>::count / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) {
      auto a = zip<0, float>(rows[i], rows[i + width]), b = zip<1, float>(rows[i], rows[i + width]);
      rows[i] = a > b ? a : b;
    }
  return rows[0];
}

// The words of a tile's mask: row i, column d at words[i * stride + d].
struct TileMask {
  uint64_t seed;
  uint32_t stream, threshold;
  float kept;
  bool used;
  uint32_t* words;
  TileMask(const DialogueAttention* a, uint32_t* words)
      : seed(a->dropout > 0 ? uint64_t(*a->seed) : 0), stream(uint32_t(a->stream)), threshold(dropout_threshold(a->dropout)),
        kept(float(1.0 / (1.0 - a->dropout))), used(a->dropout > 0), words(words) {}
  static int64_t size(int64_t longest) { return kRows * round_up(longest, 4) + 5 * kWords; }
  static int64_t stride(int64_t n) { return round_up(n, 4); }
  void draw(int64_t row, int64_t height, int64_t head, int64_t n) const {
    if (used) philox_rows(seed, row, stream + uint32_t(head), stride(n) / 4, height, words);
  }
};

// ---- the op -------------------------------------------------------------------------------------------------------------------

template <class E> struct AttentionSizes {
  int64_t heads, head, longest, head_steps;   // longest: in whole tiles; head_steps: in whole vectors
  double work;
  explicit AttentionSizes(const DialogueAttention* a) : heads(a->heads), head(a->width / a->heads), longest(1), work(0) {
    for (int64_t b = 0; b < a->dialogues; ++b) {
      const int64_t n = a->offsets[b + 1] - a->offsets[b];
      if (n > longest) longest = n;
      work += double(n) * double(n + 32) * double(a->width);   // to pack a row costs as much as some products
    }
    longest = round_up(longest, kThird);
    head_steps = round_up(steps<E>(head), Lanes<float>::count);
  }
  int threads(int64_t most) const { return useful_threads(most, work < 1e15 ? int64_t(work) : int64_t(1e15)); }
};

// Takes pieces of one thread's scratch; without scratch it counts them. Every number has four bytes.
struct Pieces {
  float* data;
  int64_t used = 0;
  explicit Pieces(float* data) : data(data) {}
  template <class U> U* take(int64_t size) {
    float* piece = data ? data + used : nullptr;
    used += round_up(size, 16);
    return (U*)piece;
  }
  template <class U> Panels<U> take(int64_t rows, int64_t width) { return {take<U>(Panels<U>::size(rows, width)), rows}; }
};

template <class E> struct ForwardScratch : Pieces {
  using U = Word<E>;
  Panels<U> keys, values, queries, weights;   // weights: the scores themselves where they are float
  Panels<float> scores, result;
  uint32_t* words;
  ForwardScratch(float* data, const AttentionSizes<E>& size) : Pieces(data) {
    keys = take<U>(size.head_steps, size.longest);
    values = take<U>(steps<E>(size.longest), size.head);
    queries = take<U>(kRows, size.head);
    scores = take<float>(kRows, size.longest);
    if constexpr (Step<E>::elements == 1) weights = scores;
    else weights = take<U>(kRows, steps<E>(size.longest));
    result = take<float>(kRows, size.head);
    words = take<uint32_t>(TileMask::size(size.longest));
  }
};

//   qkv | out logsum
template <class S> static int dialogue_attention_forward(const DialogueAttention* args) {
  using E = Operand<S>;
  constexpr int lanes = Lanes<float>::count;
  const AttentionSizes<E> size(args);
  const int64_t head = size.head, stride = 3 * args->width;
  const S* qkv = (const S*)args->tensors[0];
  S* out = (S*)args->tensors[1];
  float* logsum = (float*)args->tensors[2];
  const int threads = size.threads(args->threads);
  Scratch<float> scratch(ForwardScratch<E>(nullptr, size).used, threads);
  if (!scratch.ok()) return 1;
  const float scale = float(args->scale);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t job = 0; job < args->dialogues * size.heads; ++job) {
    const int64_t b = job / size.heads, h = job % size.heads, start = args->offsets[b], n = args->offsets[b + 1] - start;
    if (n == 0) continue;
    const ForwardScratch<E> own(scratch.of(omp_get_thread_num()), size);
    const TileMask mask(args, own.words);
    const auto P = own.scores, O = own.result;
    const S* q = qkv + start * stride + h * head;
    pack_columns(own.keys, q + args->width, stride, n, head);
    pack_steps(own.values, q + 2 * args->width, stride, n, head);
    for (int64_t first = 0; first < n; first += kRows) {
      const int64_t height = smaller(kRows, n - first);
      pack_rows(own.queries, q + first * stride, stride, height, head);
      product<false>(own.queries, 0, height, own.keys, steps<E>(head), n, P, 0, false);
      mask.draw(start + first, height, h, n);

      Vector<float> rows[kTileLanes] = {};
      float most[kTileLanes], log_sum[kTileLanes], inverse[kTileLanes];
      for (int64_t i = 0; i < height; ++i) {
        rows[i] = broadcast(-__builtin_inff());
        for (int64_t d = 0; d < n; d += lanes) {
          const auto next = first_lanes(load(P.at(i, d)), n - d, -__builtin_inff());
          rows[i] = next > rows[i] ? next : rows[i];
        }
      }
      for (int i = 0; i < kTileLanes; i += lanes) store(most + i, row_maxima(rows + i) * scale);
      for (int64_t i = 0; i < height; ++i) {
        Vector<float> total = {};
        for (int64_t d = 0; d < n; d += lanes) {
          auto weight = exponential(load(P.at(i, d)) * scale - most[i]);
          total += first_lanes(weight, n - d, 0.0f);
          if (mask.used) weight = keep(weight, mask.words + i * TileMask::stride(n) + d, mask.threshold, mask.kept);
          store(P.at(i, d), weight);
        }
        rows[i] = total;
      }
      for (int i = 0; i < kTileLanes; i += lanes) {
        const auto whole = row_sums<float>(rows + i);
        store(inverse + i, 1.0f / whole);
        store(log_sum + i, logarithm(whole));
      }

      if constexpr (Step<E>::elements == 2) round_tile(own.weights, P, height, n);
      product<false>(own.weights, 0, height, own.values, steps<E>(n), head, O, 0, false);
      for (int64_t i = 0; i < height; ++i) {
        const int64_t row = start + first + i;
        logsum[2 * (row * size.heads + h)] = most[i];
        logsum[2 * (row * size.heads + h) + 1] = log_sum[i];
        for (int64_t d = 0; d < head; d += lanes) store(out + row * args->width + h * head + d, load(O.at(i, d)) * inverse[i], head - d);
      }
    }
  }
  return 0;
}

// Of float operands one serves wherever the matrix is a factor.
template <class E> struct BackwardScratch : Pieces {
  using U = Word<E>;
  Panels<U> keys, values, key_steps, queries, query_steps, grads, grad_steps, weights, score_grads, score_steps;
  Panels<float> P, dS, result, to_keys, to_values;
  uint32_t* words;
  BackwardScratch(float* data, const AttentionSizes<E>& size, int64_t block) : Pieces(data) {
    keys = take<U>(size.head_steps, size.longest);
    values = take<U>(size.head_steps, size.longest);
    key_steps = take<U>(steps<E>(size.longest), size.head);
    queries = take<U>(block, steps<E>(size.head));
    grads = take<U>(block, steps<E>(size.head));
    if constexpr (Step<E>::elements == 1) {
      query_steps = queries, grad_steps = grads;
      weights = P = take<float>(block, size.longest);
      score_grads = score_steps = dS = take<float>(block, size.longest);
    } else {
      query_steps = take<U>(steps<E>(block), size.head);
      grad_steps = take<U>(steps<E>(block), size.head);
      P = take<float>(kRows, size.longest);
      dS = take<float>(kRows, size.longest);
      weights = take<U>(steps<E>(block), size.longest);
      score_grads = take<U>(kRows, steps<E>(size.longest));
      score_steps = take<U>(steps<E>(block), size.longest);
    }
    result = take<float>(kRows, size.head);
    to_keys = take<float>(size.longest, size.head);
    to_values = take<float>(size.longest, size.head);
    words = take<uint32_t>(TileMask::size(size.longest));
  }
};

//   qkv out logsum grad_out | grad_qkv
template <class S> static int dialogue_attention_backward(const DialogueAttention* args) {
  using E = Operand<S>;
  constexpr int lanes = Lanes<float>::count;
  constexpr bool rounded = Step<E>::elements == 2;
  const AttentionSizes<E> size(args);
  const int64_t head = size.head, width = args->width, stride = 3 * width;
  const S *qkv = (const S*)args->tensors[0], *out = (const S*)args->tensors[1], *grad_out = (const S*)args->tensors[3];
  const float* logsum = (const float*)args->tensors[2];
  S* grad_qkv = (S*)args->tensors[4];
  const int threads = size.threads(args->threads);
  const int64_t most_queries = smaller(kQueries, size.longest);
  Scratch<float> scratch(BackwardScratch<E>(nullptr, size, most_queries).used, threads);
  if (!scratch.ok()) return 1;
  const float scale = float(args->scale);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t job = 0; job < args->dialogues * size.heads; ++job) {
    const int64_t b = job / size.heads, h = job % size.heads, start = args->offsets[b], n = args->offsets[b + 1] - start;
    if (n == 0) continue;
    const BackwardScratch<E> own(scratch.of(omp_get_thread_num()), size, most_queries);
    const TileMask mask(args, own.words);
    const S *q = qkv + start * stride + h * head, *o = out + start * width + h * head, *g = grad_out + start * width + h * head;
    S* grad = grad_qkv + start * stride + h * head;
    pack_columns(own.keys, q + width, stride, n, head);
    pack_columns(own.values, q + 2 * width, stride, n, head);
    pack_steps(own.key_steps, q + width, stride, n, head);
    for (int64_t block = 0; block < n; block += kQueries) {
      const int64_t count = smaller(kQueries, n - block);
      pack_rows(own.queries, q + block * stride, stride, count, head);
      pack_rows(own.grads, g + block * width, width, count, head);
      if (rounded) {
        pack_steps(own.query_steps, q + block * stride, stride, count, head);
        pack_steps(own.grad_steps, g + block * width, width, count, head);
      }
      for (int64_t first = 0; first < count; first += kRows) {
        const int64_t height = smaller(kRows, count - first), row = start + block + first, tile = rounded ? 0 : first;
        product<false>(own.queries, first, height, own.keys, steps<E>(head), n, own.P, tile, false);
        product<false>(own.grads, first, height, own.values, steps<E>(head), n, own.dS, tile, false);
        mask.draw(row, height, h, n);

        Vector<float> rows[kTileLanes] = {};
        float mean[kTileLanes];
        for (int64_t i = 0; i < height; ++i) {
          const int64_t at = (block + first + i) * width;
          for (int64_t d = 0; d < head; d += lanes) rows[i] += load(g + at + d, head - d) * load(o + at + d, head - d);
        }
        for (int i = 0; i < kTileLanes; i += lanes) store(mean + i, row_sums<float>(rows + i));
        for (int64_t i = 0; i < height; ++i) {
          const float *kept = logsum + 2 * ((row + i) * size.heads + h), most = kept[0], log_sum = kept[1];
          for (int64_t d = 0; d < n; d += lanes) {
            float *p = own.P.at(tile + i, d), *s = own.dS.at(tile + i, d);
            auto weight = exponential(load(p) * scale - most - log_sum), gradient = load(s), masked = weight;
            if (mask.used) {
              const uint32_t* words = mask.words + i * TileMask::stride(n) + d;
              gradient = keep(gradient, words, mask.threshold, mask.kept);
              masked = keep(weight, words, mask.threshold, mask.kept);
            }
            store(p, masked);
            store(s, weight * (gradient - mean[i]) * scale);
          }
        }
        if constexpr (rounded) {
          round_tile(own.score_grads, own.dS, height, n);
          round_transposed(own.score_steps, first, own.dS, height, n);
          round_transposed(own.weights, first, own.P, height, n);
        }
        product<false>(own.score_grads, tile, height, own.key_steps, steps<E>(n), head, own.result, 0, false);
        for (int64_t i = 0; i < height; ++i)
          for (int64_t d = 0; d < head; d += lanes)
            store(grad + (block + first + i) * stride + d, load(own.result.at(i, d)), head - d);
      }
      product_of_transpose(own.score_steps, n, own.query_steps, steps<E>(count), head, own.to_keys, block > 0);
      product_of_transpose(own.weights, n, own.grad_steps, steps<E>(count), head, own.to_values, block > 0);
    }
    for (int64_t row = 0; row < n; ++row)
      for (int64_t d = 0; d < head; d += lanes) {
        store(grad + row * stride + width + d, load(own.to_keys.at(row, d)), head - d);
        store(grad + row * stride + 2 * width + d, load(own.to_values.at(row, d)), head - d);
      }
  }
  return 0;
}
