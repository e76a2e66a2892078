// Self-attention inside each dialogue; mathematics in ada2i_fast/ops/dialogue_attention.py. S is the storage type, arithmetic is in float.
// A job is one head of one dialogue. Its scores exist for kRows queries at a time forward and for kQueries backward, so memory is linear
// in the rows.

constexpr int64_t kQueries = 4 * kRows;

// exp(x) for x <= 88; below -87 the result stays at exp(-87), 1e-38. Error below 2 ulp (Moshier, Cephes expf).
INLINE Vector<float> exponential(Vector<float> x) {
  x = x < -87.0f ? broadcast(-87.0f) : x;                                    // a NaN stays one
  auto n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;           // to the nearest integer
  auto r = x - n * 0.693359375f - n * -2.12194440e-4f;
  auto p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Vector<float>)((__builtin_convertvector(n, Vector<int32_t>) + 127) << 23);
}

// Right operands from `count` rows of `width` numbers: as they stand (steps are the rows), and transposed (columns are the rows).
template <class S> INLINE void pack_rows(float* right, const S* rows, int64_t stride, int64_t count, int64_t width) {
  constexpr int lanes = Lanes<float>::count, columns = kColumns<float>;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t d = 0; d < width; d += lanes)
      store(right + d / columns * columns * count + r * columns + d % columns, load(rows + r * stride + d, width - d));
}
template <class S> INLINE void pack_columns(float* right, const S* rows, int64_t stride, int64_t count, int64_t width) {
  constexpr int columns = kColumns<float>;
  for (int64_t first = 0; first < count; first += columns) {
    float* panel = right + first * width;
    const int64_t n = smaller(columns, count - first);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t d = 0; d < width; ++d) panel[d * columns + r] = to_compute(rows[(first + r) * stride + d]);
    for (int64_t r = n; r < columns; ++r)
      for (int64_t d = 0; d < width; ++d) panel[d * columns + r] = 0;
  }
}

INLINE float largest(const float* row, int64_t n) {
  constexpr int lanes = Lanes<float>::count;
  auto most = broadcast(row[0]);
  int64_t d = 0;
  for (; d + lanes <= n; d += lanes) {
    auto next = load(row + d);
    most = next > most ? next : most;
  }
  float found = row[0];
  for (int i = 0; i < lanes; ++i) found = most[i] > found ? most[i] : found;
  for (; d < n; ++d) found = row[d] > found ? row[d] : found;
  return found;
}

struct AttentionSizes {
  int64_t heads, head, longest, padded;
  double work;
  explicit AttentionSizes(const DialogueAttention* a) : heads(a->heads), head(a->width / a->heads), longest(1), work(0) {
    for (int64_t b = 0; b < a->dialogues; ++b) {
      const int64_t n = a->offsets[b + 1] - a->offsets[b];
      if (n > longest) longest = n;
      work += double(n) * double(n) * double(a->width);
    }
    padded = round_up(longest, kColumns<float>) + kWords;
  }
  int threads(int64_t most) const { return useful_threads(most, work < 1e15 ? int64_t(work) : int64_t(1e15)); }
};

template <class S> INLINE void pack_tile(float* left, const S* rows, int64_t stride, int64_t height, int64_t width) {
  for (int i = 0; i < kRows; ++i)
    pack_left(left, i, width, [&](int64_t d, int64_t n) { return i < height ? load(rows + i * stride + d, n) : Vector<float>{}; });
}

INLINE void keep_columns(const DialogueAttention* args, int64_t row, int64_t h, int64_t n, float* values) {
  constexpr int lanes = Lanes<float>::count;
  const uint32_t threshold = dropout_threshold(args->dropout);
  const float kept = float(1.0 / (1.0 - args->dropout));
  uint32_t words[kWords];
  for (int64_t d = 0; d < n; d += kWords) {
    philox(uint64_t(*args->seed), row, uint32_t(args->stream + h), d, words);
    for (int v = 0; v < kWords; v += lanes) store(values + d + v, keep(load(values + d + v), words + v, threshold, kept));
  }
}

//   qkv | out logsum
template <class S> static int dialogue_attention_forward(const DialogueAttention* args) {
  constexpr int lanes = Lanes<float>::count;
  const AttentionSizes size(args);
  const int64_t head = size.head, stride = 3 * args->width, padded = size.padded;
  const S* qkv = (const S*)args->tensors[0];
  S* out = (S*)args->tensors[1];
  float* logsum = (float*)args->tensors[2];
  const int threads = size.threads(args->threads);
  Scratch<float> keys(right_size<float>(head, size.longest), threads), values(right_size<float>(size.longest, head), threads);
  Scratch<float> left(left_size<float>(head > size.longest ? head : size.longest), threads), scores(kRows * padded, threads);
  if (!keys.ok() || !values.ok() || !left.ok() || !scores.ok()) return 1;
  const float scale = float(args->scale);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t job = 0; job < args->dialogues * size.heads; ++job) {
    const int64_t b = job / size.heads, h = job % size.heads, start = args->offsets[b], n = args->offsets[b + 1] - start;
    if (n == 0) continue;
    const int thread = omp_get_thread_num();
    float *K = keys.of(thread), *V = values.of(thread), *tile = left.of(thread), *P = scores.of(thread);
    const S* q = qkv + start * stride + h * head;
    pack_columns(K, q + args->width, stride, n, head);
    pack_rows(V, q + 2 * args->width, stride, n, head);
    for (int64_t first = 0; first < n; first += kRows) {
      const int64_t height = smaller(kRows, n - first);
      float inverse[kRows];
      pack_tile(tile, q + first * stride, stride, height, head);
      multiply<Strips>(tile, K, head, n, [&](const float* c, int64_t column, int64_t) {
        for (int64_t i = 0; i < height; ++i)
          for (int v = 0; v < kColumns<float>; v += lanes) store(P + i * padded + column + v, load(c + i * kColumns<float> + v) * scale);
      });
      for (int64_t i = 0; i < height; ++i) {
        float *row = P + i * padded, *kept = logsum + 2 * ((start + first + i) * size.heads + h);
        const float most = largest(row, n);
        Vector<float> total = {};
        for (int64_t d = 0; d < n; d += lanes) {
          store(row + d, exponential(load(row + d) - most));
          total += load(row + d, n - d);
        }
        const float whole = lane_sum(total);
        inverse[i] = 1.0f / whole;
        kept[0] = most;
        kept[1] = logarithm(broadcast(whole))[0];
        if (args->dropout > 0) keep_columns(args, start + first + i, h, n, row);
      }
      pack_tile(tile, P, padded, height, n);
      multiply<Strips>(tile, V, n, head, [&](const float* c, int64_t column, int64_t columns) {
        for (int64_t i = 0; i < height; ++i)
          for (int64_t v = 0; v < columns; v += lanes)
            store(out + (start + first + i) * args->width + h * head + column + v, load(c + i * kColumns<float> + v) * inverse[i],
                  columns - v);
      });
    }
  }
  return 0;
}

// rows[j] (+)= sum_r factor[r][j] right[r], for n rows of `width` numbers; factor: [count][padded], right packed.
INLINE void add_transposed(float* rows, const float* factor, int64_t padded, const float* right, int64_t count, int64_t n, int64_t width,
                           bool add, float* left) {
  constexpr int lanes = Lanes<float>::count;
  for (int64_t first = 0; first < n; first += kRows) {
    const int64_t height = smaller(kRows, n - first);
    for (int64_t r = 0; r < count; ++r) __builtin_memcpy(left + r * kRows, factor + r * padded + first, kRows * sizeof(float));
    multiply<Columns>(left, right, count, width, [&](const float* c, int64_t column, int64_t columns) {
      for (int64_t i = 0; i < height; ++i)
        for (int64_t v = 0; v < columns; v += lanes) {
          float* to = rows + (first + i) * width + column + v;
          auto value = load(c + i * kColumns<float> + v);
          if (add) value += load(to, columns - v);
          store(to, value, columns - v);
        }
    });
  }
}

//   qkv out logsum grad_out | grad_qkv
template <class S> static int dialogue_attention_backward(const DialogueAttention* args) {
  constexpr int lanes = Lanes<float>::count;
  const AttentionSizes size(args);
  const int64_t head = size.head, width = args->width, stride = 3 * width, padded = size.padded;
  const S *qkv = (const S*)args->tensors[0], *out = (const S*)args->tensors[1], *grad_out = (const S*)args->tensors[3];
  const float* logsum = (const float*)args->tensors[2];
  S* grad_qkv = (S*)args->tensors[4];
  const int threads = size.threads(args->threads);
  const int64_t longest = size.longest > head ? size.longest : head;
  Scratch<float> keys(right_size<float>(head, size.longest), threads), values(right_size<float>(head, size.longest), threads);
  Scratch<float> straight(right_size<float>(size.longest, head), threads), queries(2 * right_size<float>(kQueries, head), threads);
  Scratch<float> left(left_size<float>(longest > kQueries ? longest : kQueries), threads);
  Scratch<float> weights(kQueries * padded, threads), gradients(kQueries * padded, threads), sums(2 * size.longest * head, threads);
  if (!keys.ok() || !values.ok() || !straight.ok() || !queries.ok() || !left.ok() || !weights.ok() || !gradients.ok() || !sums.ok())
    return 1;
  const float scale = float(args->scale);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t job = 0; job < args->dialogues * size.heads; ++job) {
    const int64_t b = job / size.heads, h = job % size.heads, start = args->offsets[b], n = args->offsets[b + 1] - start;
    if (n == 0) continue;
    const int thread = omp_get_thread_num();
    float *K = keys.of(thread), *V = values.of(thread), *K_rows = straight.of(thread), *tile = left.of(thread);
    float *Q_rows = queries.of(thread), *G_rows = Q_rows + right_size<float>(kQueries, head);
    float *P = weights.of(thread), *dS = gradients.of(thread), *to_keys = sums.of(thread), *to_values = to_keys + n * head;
    const S *q = qkv + start * stride + h * head, *o = out + start * width + h * head, *g = grad_out + start * width + h * head;
    S* grad = grad_qkv + start * stride + h * head;
    pack_columns(K, q + width, stride, n, head);
    pack_columns(V, q + 2 * width, stride, n, head);
    pack_rows(K_rows, q + width, stride, n, head);
    for (int64_t block = 0; block < n; block += kQueries) {
      const int64_t count = smaller(kQueries, n - block);
      for (int64_t first = block; first < block + count; first += kRows) {
        const int64_t height = smaller(kRows, block + count - first);
        float *P_tile = P + (first - block) * padded, *dS_tile = dS + (first - block) * padded;
        auto copy_to = [&](float* to, float factor) {
          return [=](const float* c, int64_t column, int64_t) {
            for (int64_t i = 0; i < height; ++i)
              for (int v = 0; v < kColumns<float>; v += lanes) store(to + i * padded + column + v, load(c + i * kColumns<float> + v) * factor);
          };
        };
        pack_tile(tile, q + first * stride, stride, height, head);
        multiply<Strips>(tile, K, head, n, copy_to(P_tile, scale));
        pack_tile(tile, g + first * width, width, height, head);
        multiply<Strips>(tile, V, head, n, copy_to(dS_tile, 1.0f));
        for (int64_t i = 0; i < height; ++i) {
          const int64_t row = first + i;
          const float *kept = logsum + 2 * ((start + row) * size.heads + h), most = kept[0], log_sum = kept[1];
          float *p = P_tile + i * padded, *s = dS_tile + i * padded;
          Vector<float> dot = {};
          for (int64_t d = 0; d < head; d += lanes) dot += load(g + row * width + d, head - d) * load(o + row * width + d, head - d);
          const float mean = lane_sum(dot);
          if (args->dropout > 0) keep_columns(args, start + row, h, n, s);
          for (int64_t d = 0; d < n; d += lanes) {
            auto weight = exponential(load(p + d) - most - log_sum);
            store(p + d, weight);
            store(s + d, weight * (load(s + d) - mean) * scale);
          }
          if (args->dropout > 0) keep_columns(args, start + row, h, n, p);
        }
        pack_tile(tile, dS_tile, padded, height, n);
        multiply<Strips>(tile, K_rows, n, head, [&](const float* c, int64_t column, int64_t columns) {
          for (int64_t i = 0; i < height; ++i)
            for (int64_t v = 0; v < columns; v += lanes)
              store(grad + (first + i) * stride + column + v, load(c + i * kColumns<float> + v), columns - v);
        });
      }
      pack_rows(Q_rows, q + block * stride, stride, count, head);
      pack_rows(G_rows, g + block * width, width, count, head);
      add_transposed(to_keys, dS, padded, Q_rows, count, n, head, block > 0, tile);
      add_transposed(to_values, P, padded, G_rows, count, n, head, block > 0, tile);
    }
    for (int64_t row = 0; row < n; ++row)
      for (int64_t d = 0; d < head; d += lanes) {
        store(grad + row * stride + width + d, load(to_keys + row * head + d, head - d), head - d);
        store(grad + row * stride + 2 * width + d, load(to_values + row * head + d, head - d), head - d);
      }
  }
  return 0;
}
