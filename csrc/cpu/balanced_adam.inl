// Adam over many tensors at once, with the factor and the noise of each; mathematics in ada2i_fast/ops/balanced_adam.py.
// Tensors are cut into chunks of fixed size, so results do not depend on the number of threads.

constexpr int64_t kAdamChunk = 1 << 14;
constexpr int64_t kPairs = 16;     // in a block of 32 normals, number i shares its radius with number i + 16
constexpr int64_t kNormals = 64;   // drawn at a time
constexpr int64_t kAhead = 1024;   // numbers between what is fetched and what is computed: over so much arithmetic the processor fetches too little

// Two standard normals per lane from two random words (Box and Muller, 1958): radius sqrt(-2 log((a + 1) / 2^32)), angle 2 pi b / 2^32.
// The angle's quadrant is taken off in integers, exactly; the rest lies in [-pi/4, pi/4).
INLINE void normals(Vector<uint32_t> a, Vector<uint32_t> b, Vector<float>& first, Vector<float>& second) {
  auto u = (__builtin_convertvector(a, Vector<float>) + 1.0f) * 2.3283064365386963e-10f;
  auto squared = -2.0f * logarithm(u);
  auto radius = square_root(squared > 0 ? squared : Vector<float>{});
  auto quadrant = (b + 0x20000000u) >> 30;
  auto t = __builtin_convertvector((Vector<int32_t>)(b - (quadrant << 30)), Vector<float>) * 1.4629180792671596e-9f;   // pi / 2^31
  auto s = t * t;
  auto sine = t + t * s * (-1.6666654611e-1f + s * (8.3321608736e-3f + s * -1.9515295891e-4f));
  auto cosine = 1.0f - 0.5f * s + s * s * (4.166664568298827e-2f + s * (-1.388731625493765e-3f + s * 2.443315711809948e-5f));
  auto odd = (quadrant & 1u) != 0u;
  auto x = odd ? sine : cosine, y = odd ? cosine : sine;
  first = radius * (((quadrant + 1u) & 2u) != 0u ? -x : x);
  second = radius * ((quadrant & 2u) != 0u ? -y : y);
}

// The normals of elements first .. first + 63 of a tensor; `first` is a multiple of 32. The words are those of the dropout mask,
// with the tensor's number for the row, the element for the column and the step for the stream.
INLINE void draw(uint64_t seed, int64_t tensor, uint32_t step, int64_t first, float* out) {
  constexpr int lanes = Lanes<float>::count, blocks = kNormals / kWords < 4 ? kNormals / kWords : 4;
  uint32_t words[kNormals];
  for (int64_t k = 0; k < kNormals; k += blocks * kWords) philox_blocks<blocks>(seed, tensor, step, first + k, words + k);
  for (int block = 0; block < kNormals; block += 2 * kPairs)
    for (int k = block; k < block + kPairs; k += lanes) {
      Vector<uint32_t> a, b;
      __builtin_memcpy(&a, words + k, sizeof a);
      __builtin_memcpy(&b, words + kPairs + k, sizeof b);
      Vector<float> x, y;
      normals(a, b, x, y);
      store(out + k, x);
      store(out + kPairs + k, y);
    }
}

struct AdamChunk { int64_t tensor, first, size; };

static int64_t adam_chunks(const BalancedAdam* args, AdamChunk* out) {
  int64_t count = 0;
  for (int64_t t = 0; t < args->count; ++t)
    for (int64_t first = 0; first < args->sizes[t]; first += kAdamChunk, ++count)
      if (out) out[count] = {t, first, smaller(kAdamChunk, args->sizes[t] - first)};
  return count;
}

// Per tensor: mean and sum of squared deviations from it, merged chunk by chunk (Chan, Golub, LeVeque 1979).
static int balanced_adam_measure(const BalancedAdam* args) {
  constexpr int lanes = Lanes<float>::count;
  constexpr int64_t part = 2048;                                 // stays in the first-level cache between its two passes
  const int64_t count = adam_chunks(args, nullptr);
  Scratch<AdamChunk> chunks(count);
  Scratch<double> found(2 * count);
  if (!chunks.ok() || !found.ok()) return 1;
  adam_chunks(args, chunks.data);
#pragma omp parallel for num_threads(useful_threads(args->threads, count * kAdamChunk)) schedule(static)
  for (int64_t c = 0; c < count; ++c) {
    const auto chunk = chunks.data[c];
    const float* g = (const float*)args->tensors[chunk.tensor] + chunk.first;
    double mean = 0, square = 0;
    for (int64_t at = 0; at < chunk.size; at += part) {
      const int64_t n = smaller(part, chunk.size - at);
      Vector<float> total[4] = {}, spread[4] = {};
      int64_t d = 0;
      for (; d + 4 * lanes <= n; d += 4 * lanes)
        for (int k = 0; k < 4; ++k) total[k] += load(g + at + d + k * lanes);
      for (; d < n; d += lanes) total[0] += load(g + at + d, n - d);
      const float shift = lane_sum(total[0] + total[1] + (total[2] + total[3])) / float(n);      // nearly the mean
      for (auto& t : total) t = Vector<float>{};
      for (d = 0; d + 4 * lanes <= n; d += 4 * lanes)
        for (int k = 0; k < 4; ++k) {
          auto x = load(g + at + d + k * lanes) - shift;
          total[k] += x;
          spread[k] += x * x;
        }
      double rest = lane_sum(total[0] + total[1] + (total[2] + total[3]));
      double own_square = lane_sum(spread[0] + spread[1] + (spread[2] + spread[3]));
      for (; d < n; ++d) {
        const double x = double(g[at + d]) - double(shift);
        rest += x;
        own_square += x * x;
      }
      const double own = double(shift) + rest / double(n);
      own_square -= rest * rest / double(n);
      const double away = own - mean;
      square += own_square + away * away * double(at) * double(n) / double(at + n);
      mean += away * double(n) / double(at + n);
    }
    found.data[2 * c] = mean;
    found.data[2 * c + 1] = square;
  }
  for (int64_t t = 0; t < args->count; ++t) args->measures[2 * t] = args->measures[2 * t + 1] = 0;
  for (int64_t c = 0; c < count; ++c) {
    const auto chunk = chunks.data[c];
    double* to = args->measures + 2 * chunk.tensor;
    const double away = found.data[2 * c] - to[0], whole = double(chunk.first + chunk.size);
    to[1] += found.data[2 * c + 1] + away * away * double(chunk.first) * double(chunk.size) / whole;
    to[0] += away * double(chunk.size) / whole;
  }
  return 0;
}

// Calls body(d, n, noise) for every vector of a chunk: its first element, how many are left, and its normals (0 without noise).
template <typename Body>
INLINE void for_elements(const BalancedAdam* args, AdamChunk chunk, bool noisy, Body body) {
  constexpr int lanes = Lanes<float>::count;
  if (!args->seed || !noisy) {
    for (int64_t d = 0; d < chunk.size; d += lanes) body(d, chunk.size - d, Vector<float>{});
    return;
  }
  float noise[kNormals];
  for (int64_t d = 0; d < chunk.size; d += kNormals) {
    draw(uint64_t(args->seed[0]), args->numbers[chunk.tensor], uint32_t(args->seed[1]), chunk.first + d, noise);
    for (int64_t k = 0; k < kNormals && d + k < chunk.size; k += lanes) body(d + k, chunk.size - d - k, load(noise + k));
  }
}

static int balanced_adam_update(const BalancedAdam* args) {
  const int64_t count = adam_chunks(args, nullptr), T = args->count;
  Scratch<AdamChunk> chunks(count);
  if (!chunks.ok()) return 1;
  adam_chunks(args, chunks.data);
  const float forget1 = float(1 - args->beta1), beta2 = float(args->beta2), forget2 = float(1 - args->beta2), eps = float(args->eps);
#pragma omp parallel for num_threads(useful_threads(args->threads, count * kAdamChunk)) schedule(static)
  for (int64_t c = 0; c < count; ++c) {
    const auto chunk = chunks.data[c];
    float* p = (float*)args->tensors[chunk.tensor] + chunk.first;
    const float* g = (const float*)args->tensors[T + chunk.tensor] + chunk.first;
    float* m = (float*)args->tensors[2 * T + chunk.tensor] + chunk.first;
    float* v = (float*)args->tensors[3 * T + chunk.tensor] + chunk.first;
    const double* s = args->settings + 6 * chunk.tensor;
    const float factor = float(s[0]), decay = float(s[1]), rate = float(s[2]), root = float(s[3]);
    const float to_gradient = float(s[4]), to_parameter = float(s[5]);
    auto update = [&](int64_t d, int64_t n, Vector<float> noise) __attribute__((always_inline)) {
      __builtin_prefetch(p + d + kAhead, 1), __builtin_prefetch(g + d + kAhead);
      __builtin_prefetch(m + d + kAhead, 1), __builtin_prefetch(v + d + kAhead, 1);
      auto theta = load(p + d, n), first = load(m + d, n), second = load(v + d, n);
      auto gradient = load(g + d, n) * factor + noise * to_gradient;
      gradient += theta * decay;
      first += (gradient - first) * forget1;
      second = second * beta2 + gradient * gradient * forget2;
      theta -= rate * first / (square_root(second) * root + eps);
      theta += noise * to_parameter;
      store(p + d, theta, n);
      store(m + d, first, n);
      store(v + d, second, n);
    };
    for_elements(args, chunk, to_gradient != 0 || to_parameter != 0, update);
  }
  return 0;
}

// The same factor and noise, written into the gradients: tensors[t] <- f tensors[t] + s_g e.
static int balanced_adam_modulate(const BalancedAdam* args) {
  const int64_t count = adam_chunks(args, nullptr);
  Scratch<AdamChunk> chunks(count);
  if (!chunks.ok()) return 1;
  adam_chunks(args, chunks.data);
#pragma omp parallel for num_threads(useful_threads(args->threads, count * kAdamChunk)) schedule(static)
  for (int64_t c = 0; c < count; ++c) {
    const auto chunk = chunks.data[c];
    float* g = (float*)args->tensors[chunk.tensor] + chunk.first;
    const float factor = float(args->settings[6 * chunk.tensor]), to_gradient = float(args->settings[6 * chunk.tensor + 4]);
    for_elements(args, chunk, to_gradient != 0, [&](int64_t d, int64_t n, Vector<float> noise) __attribute__((always_inline)) {
      store(g + d, load(g + d, n) * factor + noise * to_gradient, n);
    });
  }
  return 0;
}

// For tests: the normals of one tensor, args->tensors[0].
static int balanced_adam_noise(const BalancedAdam* args) {
  float* out = (float*)args->tensors[0];
  const int64_t size = args->sizes[0];
  for (int64_t d = 0; d < size; d += kNormals) {
    float noise[kNormals];
    draw(uint64_t(args->seed[0]), args->numbers[0], uint32_t(args->seed[1]), d, noise);
    for (int64_t k = 0; k < kNormals && d + k < size; ++k) out[d + k] = noise[k];
  }
  return 0;
}
