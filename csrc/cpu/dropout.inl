// Bias + ReLU + dropout, and bias + dropout + residual + LayerNorm; mathematics in ada2i_fast/ops/dropout.py. S is the type of what
// matrix products give and take; the residual stream, the parameters and the arithmetic are float. Sums over rows are taken in blocks
// of fixed size, so results do not depend on the number of threads.

constexpr int64_t kPanel = 2 * kWords > 64 ? 2 * kWords : 64;   // columns per job where threads divide columns
constexpr int64_t kRowBlock = 32;

// The columns d to d + kWords of the row that comes next are fetched during this one: rows are about as long as pages, at whose ends the
// processor stops to fetch by itself.
template <class S> INLINE void fetch(const S* next, int64_t d) {
  for (int64_t v = 0; v < kWords; v += 64 / int64_t(sizeof(S))) __builtin_prefetch(next + d + v);
}

INLINE float lane_sum(Vector<float> value) {
  float total[Lanes<float>::count];
  store(total, value);
  for (int width = Lanes<float>::count / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) total[i] += total[i + width];
  return total[0];
}

struct Mask {
  uint64_t seed;
  uint32_t stream, threshold;
  float kept;
  bool used;
  template <class Args>
  explicit Mask(const Args* a)
      : seed(a->dropout > 0 ? uint64_t(*a->seed) : 0), stream(uint32_t(a->stream)), threshold(dropout_threshold(a->dropout)),
        kept(float(1.0 / (1.0 - a->dropout))), used(a->dropout > 0) {}
};

template <class S> static int relu_dropout_forward(const DropoutFused* args) {
  constexpr int lanes = Lanes<float>::count;
  const int64_t rows = args->rows, width = args->width;
  const S* x = (const S*)args->tensors[0];
  const float* bias = (const float*)args->tensors[1];
  S* out = (S*)args->tensors[2];
  const Mask mask(args);
#pragma omp parallel for num_threads(useful_threads(args->threads, rows * width * 4)) schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    uint32_t words[kWords];
    for (int64_t d = 0; d < width; d += kWords) {
      if (mask.used) philox(mask.seed, n, mask.stream, d, words);
      for (int64_t v = 0; v < kWords && d + v < width; v += lanes) {
        const int64_t at = d + v, left = width - at;
        auto value = load(x + n * width + at, left) + load(bias + at, left);
        value = value < 0 ? Vector<float>{} : value;
        if (mask.used) value = keep(value, words + v, mask.threshold, mask.kept);
        store(out + n * width + at, value, left);
      }
    }
  }
  return 0;
}

// What was dropped or cut off is 0 in the output, so the output is the mask.
template <class S> static int relu_dropout_backward(const DropoutFused* args) {
  constexpr int lanes = Lanes<float>::count;
  const int64_t rows = args->rows, width = args->width, padded = round_up(width, lanes), blocks = (rows + kRowBlock - 1) / kRowBlock;
  const S *grad_out = (const S*)args->tensors[0], *out = (const S*)args->tensors[1];
  S* grad_x = (S*)args->tensors[2];
  float* grad_bias = (float*)args->tensors[3];
  const float kept = float(1.0 / (1.0 - args->dropout));
  const int threads = useful_threads(args->threads, rows * width * 2);
  Scratch<float> partial(padded, blocks);
  if (!partial.ok()) return 1;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      float* to_bias = partial.of(block);
      const int64_t first = block * kRowBlock, last = smaller(first + kRowBlock, rows);
      for (int64_t panel = 0; panel < width; panel += kPanel) {
        Vector<float> total[kPanel / lanes] = {};
        for (int64_t n = first; n < last; ++n)
#pragma GCC unroll 16
          for (int v = 0; v < kPanel / lanes; ++v) {
            const int64_t at = n * width + panel + v * lanes, left = width - panel - v * lanes;
            if (left <= 0) break;
            auto g = load(grad_out + at, left) * kept;
            g = load(out + at, left) > 0 ? g : Vector<float>{};
            total[v] += g;
            store(grad_x + at, g, left);
          }
        for (int v = 0; v < kPanel / lanes && panel + v * lanes < width; ++v) store(to_bias + panel + v * lanes, total[v]);
      }
    }
#pragma omp for schedule(static)
    for (int64_t d = 0; d < width; d += lanes) {
      Vector<float> total = {};
      for (int64_t block = 0; block < blocks; ++block) total += load(partial.of(block) + d);
      store(grad_bias + d, total, width - d);
    }
  }
  return 0;
}

// s = residual + dropout(x + bias) of row n into `row`, which has room for whole vectors; lanes past the width are 0. Returns its sum.
// The row's random words stay in `words`, round_up(width, kWords) of them. more: what else the caller reads of this row, or null.
template <class S>
INLINE float residual_row(const DropoutFused* args, const Mask& mask, int64_t n, float* row, uint32_t* words, const float* more) {
  constexpr int lanes = Lanes<float>::count;
  const int64_t width = args->width;
  const S* x = (const S*)args->tensors[0] + n * width;
  const float *bias = (const float*)args->tensors[1], *residual = (const float*)args->tensors[2] + n * width;
  Vector<float> total = {};
  for (int64_t d = 0; d < width; d += kWords) {
    fetch(x + width, d);
    fetch(residual + width, d);
    if (more) fetch(more + width, d);
    if (mask.used) philox(mask.seed, n, mask.stream, d, words + d);
    for (int64_t v = 0; v < kWords && d + v < width; v += lanes) {
      const int64_t at = d + v, left = width - at;
      auto value = load(x + at, left) + load(bias + at, left);
      if (mask.used) value = keep(value, words + at, mask.threshold, mask.kept);
      value += load(residual + at, left);
      total += value;
      store(row + at, value);
    }
  }
  return lane_sum(total);
}

//   x bias residual weight norm_bias | out mean rstd
template <class S> static int dropout_norm_forward(const DropoutFused* args) {
  constexpr int lanes = Lanes<float>::count;
  const int64_t rows = args->rows, width = args->width;
  const float *weight = (const float*)args->tensors[3], *shift = (const float*)args->tensors[4];
  float *out = (float*)args->tensors[5], *means = (float*)args->tensors[6], *rstds = (float*)args->tensors[7];
  const Mask mask(args);
  const int threads = useful_threads(args->threads, rows * width * 8);
  Scratch<float> scratch(round_up(width, kWords), threads);
  Scratch<uint32_t> words(round_up(width, kWords), threads);
  if (!scratch.ok() || !words.ok()) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    float* row = scratch.of(omp_get_thread_num());
    const float mean = residual_row<S>(args, mask, n, row, words.of(omp_get_thread_num()), nullptr) / float(width);
    Vector<float> total = {};
    for (int64_t d = 0; d < width; d += lanes) {
      auto value = load(row + d, width - d) - mean;
      if (width - d >= lanes) total += value * value;
      else for (int i = 0; i < width - d; ++i) total[i] += value[i] * value[i];
    }
    const float rstd = 1.0f / __builtin_sqrtf(lane_sum(total) / float(width) + float(args->eps));
    for (int64_t d = 0; d < width; d += lanes)
      store(out + n * width + d, (load(row + d) - mean) * rstd * load(weight + d, width - d) + load(shift + d, width - d), width - d);
    means[n] = mean;
    rstds[n] = rstd;
  }
  return 0;
}

//   x bias residual weight mean rstd grad_out | grad_x grad_bias grad_residual grad_weight grad_norm_bias
template <class S> static int dropout_norm_backward(const DropoutFused* args) {
  constexpr int lanes = Lanes<float>::count;
  const int64_t rows = args->rows, width = args->width, padded = round_up(width, kWords), blocks = (rows + kRowBlock - 1) / kRowBlock;
  const float *weight = (const float*)args->tensors[3], *means = (const float*)args->tensors[4], *rstds = (const float*)args->tensors[5];
  const float* grad_out = (const float*)args->tensors[6];
  S* grad_x = (S*)args->tensors[7];
  float* grad_residual = (float*)args->tensors[9];
  float* const sums[3] = {(float*)args->tensors[8], (float*)args->tensors[10], (float*)args->tensors[11]};
  const Mask mask(args);
  const int threads = useful_threads(args->threads, rows * width * 12);
  Scratch<float> scratch(padded, threads), partial(3 * padded, blocks);
  Scratch<uint32_t> drawn(padded, threads);
  if (!scratch.ok() || !partial.ok() || !drawn.ok()) return 1;
#pragma omp parallel num_threads(threads)
  {
    float* row = scratch.of(omp_get_thread_num());
    uint32_t* words = drawn.of(omp_get_thread_num());
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      float *to_bias = partial.data + block * partial.each, *to_weight = to_bias + padded, *to_shift = to_weight + padded;
      __builtin_memset(to_bias, 0, size_t(3 * padded) * sizeof(float));
      for (int64_t n = block * kRowBlock; n < smaller((block + 1) * kRowBlock, rows); ++n) {
        const float* g_row = grad_out + n * width;
        residual_row<S>(args, mask, n, row, words, g_row);
        const float mean = means[n], rstd = rstds[n];
        Vector<float> first = {}, second = {};
        for (int64_t d = 0; d < width; d += lanes) {
          auto g = load(g_row + d, width - d), normed = (load(row + d) - mean) * rstd;   // g is 0 past the width
          store(row + d, normed);
          store(to_weight + d, load(to_weight + d) + g * normed);
          store(to_shift + d, load(to_shift + d) + g);
          g *= load(weight + d, width - d);
          first += g;
          second += g * normed;
        }
        const float a = lane_sum(first) / float(width), c = lane_sum(second) / float(width);
        for (int64_t d = 0; d < width; d += lanes) {
          const int64_t left = width - d;
          auto g = rstd * (load(g_row + d, left) * load(weight + d, left) - a - load(row + d) * c);
          store(grad_residual + n * width + d, g, left);
          if (mask.used) g = keep(g, words + d, mask.threshold, mask.kept);
          store(grad_x + n * width + d, g, left);
          store(to_bias + d, load(to_bias + d) + g);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t d = 0; d < width; d += lanes)
      for (int k = 0; k < 3; ++k) {
        Vector<float> total = {};
        for (int64_t block = 0; block < blocks; ++block) total += load(partial.data + block * partial.each + k * padded + d);
        store(sums[k] + d, total, width - d);
      }
  }
  return 0;
}
