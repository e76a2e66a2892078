// Cosine fusion of AMW; mathematics in ada2i_fast/ops/cosine_fusion.py. Rows go through in blocks that stay in the first-level cache.
// Classes are padded with zeros to whole tiles, widths to whole vectors. Inside a block numbers per row lie side by side, class by
// class, so that softmax and norms are arithmetic of whole vectors. Sums over rows have a fixed order, whatever the threads.

constexpr int64_t kNoLabel = -100;      // ignore_index of torch's losses
constexpr int64_t kFusionRows = 32;      // rows of a block; a multiple of every vector
constexpr int64_t kFusionChunks = 16;    // at most as many partial weight gradients
constexpr int kTall = 4, kClasses = 3;   // a tile: 12 accumulators, as many as 16 registers have room for

// 1 / max(norm, 1e-12); a NaN stays one.
template <class T> INLINE Vector<T> inverse(Vector<T> norm) { return T(1) / (norm < T(1e-12) ? broadcast(T(1e-12)) : norm); }

template <class S> struct Fusion {
  using T = Compute<S>;
  static constexpr int lanes = Lanes<T>::count;
  const CosineFusion* args;
  int64_t M, N, D, C, padded_width, padded_classes;

  explicit Fusion(const CosineFusion* a)
      : args(a), M(a->modalities), N(a->rows), D(a->width), C(a->classes), padded_width(round_up(D, lanes)),
        padded_classes(round_up(C, kClasses)) {}

  int64_t block() const { return padded_classes * padded_width; }                    // elements of one modality's weights
  const S* hidden(int64_t m, int64_t n) const { return (const S*)args->tensors[m] + n * D; }
  const S* weight(int64_t m, int64_t c) const { return (const S*)args->tensors[M] + (c * M + m) * D; }
  int threads(int64_t products) const { return useful_threads(args->threads, N * M * padded_classes * D * products); }

  // W_m as it stands.
  void take(int64_t m, T* out) const {
    __builtin_memset(out, 0, size_t(block()) * sizeof(T));
    for (int64_t c = 0; c < C; ++c)
      for (int64_t d = 0; d < D; d += lanes) store(out + c * padded_width + d, load(weight(m, c) + d, D - d));
  }

  // W_m of unit norm. norms, where wanted: |W_m|, one per class or, over classes, one per feature.
  void take_unit(int64_t m, T* out, T* norms) const {
    take(m, out);
    if (args->over_classes) {
      for (int64_t d = 0; d < padded_width; d += lanes) {
        Vector<T> square = {};
        for (int64_t c = 0; c < C; ++c) square += load(out + c * padded_width + d) * load(out + c * padded_width + d);
        const auto norm = square_root(square), factor = inverse<T>(norm);
        for (int64_t c = 0; c < C; ++c) store(out + c * padded_width + d, load(out + c * padded_width + d) * factor);
        if (norms) store(norms + d, norm);
      }
      return;
    }
    for (int64_t c = 0; c < C; ++c) {
      T* row = out + c * padded_width;
      Vector<T> square = {};
      for (int64_t d = 0; d < padded_width; d += lanes) square += load(row + d) * load(row + d);
      const auto norm = square_root(broadcast(sum<T>(square))), factor = inverse<T>(norm);
      for (int64_t d = 0; d < padded_width; d += lanes) store(row + d, load(row + d) * factor);
      if (norms) norms[c] = norm[0];
    }
  }

  // out[c][r] = h_{first + r} . weights_c for all classes, or without weights the square of h in out[0][r]; r < height.
  void products(int64_t m, int64_t first, int64_t height, const T* weights, T* out) const {
    for (int64_t r = 0; r < height; r += kTall) {
      const S* row[kTall];
      for (int i = 0; i < kTall; ++i) row[i] = hidden(m, first + smaller(r + i, height - 1));
      if (!weights) {
        for (int i = 0; i < kTall; ++i) {
          Vector<T> total = {};
          for (int64_t d = 0; d < D; d += lanes) {
            const auto h = load(row[i] + d, D - d);
            total += h * h;
          }
          out[r + i] = sum<T>(total);
        }
        continue;
      }
      for (int64_t c = 0; c < padded_classes; c += kClasses) {
        Vector<T> total[kTall][kClasses] = {};
        for (int64_t d = 0; d < D; d += lanes) {
          Vector<T> w[kClasses];
          for (int k = 0; k < kClasses; ++k) w[k] = load(weights + (c + k) * padded_width + d);
#pragma GCC unroll 4
          for (int i = 0; i < kTall; ++i) {
            const auto h = load(row[i] + d, D - d);
#pragma GCC unroll 3
            for (int k = 0; k < kClasses; ++k) total[i][k] += h * w[k];
          }
        }
        for (int k = 0; k < kClasses; ++k)
          for (int i = 0; i < kTall; ++i) out[(c + k) * kFusionRows + r + i] = sum<T>(total[i][k]);
      }
    }
  }
};

//   hidden weight bias | joint log_prob norm scores ratio
template <class S> static int cosine_fusion_forward(const CosineFusion* args) {
  using T = Compute<S>;
  constexpr int lanes = Lanes<T>::count;
  const Fusion<S> f(args);
  const int64_t M = f.M, N = f.N, C = f.C, blocks = (N + kFusionRows - 1) / kFusionRows;
  const bool cosine = args->amw || !args->linear_scores, linear = !args->amw || args->linear_scores;
  const int threads = f.threads(cosine + linear);
  const int64_t tile = f.padded_classes * kFusionRows;
  Scratch<T> weights(M * f.block() * (cosine + linear)), scratch(3 * tile + kFusionRows, threads);
  Scratch<double> partial(blocks * M);
  if (!weights.ok() || !scratch.ok() || !partial.ok()) return 1;
  T *const unit = weights.data, *const plain = unit + (cosine ? M * f.block() : 0);
  const S* bias = (const S*)args->tensors[M + 1];
  S* joint = (S*)args->tensors[M + 2];
  T *log_prob = (T*)args->tensors[M + 3], *norms = (T*)args->tensors[M + 4];
  int64_t outside = N;

#pragma omp parallel num_threads(threads)
  {
    T *const cosines = scratch.of(omp_get_thread_num()), *const maps = cosines + tile, *const joints = maps + tile;
    T *const norm = joints + tile;
#pragma omp for schedule(static)
    for (int64_t job = 0; job < 2 * M; ++job) {
      if (job < M && cosine) f.take_unit(job, unit + job * f.block(), nullptr);
      if (job >= M && linear) f.take(job - M, plain + (job - M) * f.block());
    }
#pragma omp for schedule(static) reduction(min : outside)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kFusionRows, height = smaller(kFusionRows, N - first);
      __builtin_memset(cosines, 0, size_t(3 * tile + kFusionRows) * sizeof(T));
      for (int64_t m = 0; m < M; ++m) {
        f.products(m, first, height, nullptr, norm);
        if (cosine) f.products(m, first, height, unit + m * f.block(), cosines);
        if (linear) f.products(m, first, height, plain + m * f.block(), maps);
        double score = 0;
        for (int64_t r = 0; r < height; r += lanes) {
          const int64_t left = height - r;
          const auto length = square_root(load(norm + r)), factor = T(args->scale) * inverse<T>(length);
          store(norms + m * N + first + r, length, left);
          T* logits = (args->linear_scores ? maps : cosines) + r;
          auto most = broadcast(T(-__builtin_inf()));
          for (int64_t c = 0; c < C; ++c) {
            const T share = bias ? to_compute(bias[c]) / T(M) : T(0);
            const int64_t at = c * kFusionRows + r;
            T *of_cosine = cosines + at, *of_map = maps + at, *of_joint = joints + at;
            if (cosine) store(of_cosine, load(of_cosine) * factor + share);
            if (linear) store(of_map, load(of_map) + share);
            store(of_joint, load(of_joint) + load(args->amw ? of_cosine : of_map));
            const auto x = load(logits + c * kFusionRows);
            most = x > most ? x : most;
          }
          Vector<T> total = {};
          for (int64_t c = 0; c < C; ++c) total += exponential(load(logits + c * kFusionRows) - most);
          most += logarithm(total);
          for (int64_t c = 0; c < C; ++c) store(logits + c * kFusionRows, load(logits + c * kFusionRows) - most);
          for (int64_t i = 0; i < smaller(lanes, left); ++i) {
            const int64_t n = first + r + i;
            for (int64_t c = 0; c < C; ++c) log_prob[(m * N + n) * C + c] = logits[c * kFusionRows + i];
            if (!args->labels) continue;
            const int64_t y = args->labels[n];
            if (y >= 0 && y < C) score += double(exponential(broadcast(logits[y * kFusionRows + i]))[0]);
            else if (y != kNoLabel && n < outside) outside = n;
          }
        }
        partial.data[block * M + m] = score;
      }
      for (int64_t r = 0; r < height; ++r)
        for (int64_t c = 0; c < C; c += lanes) {
          T row[lanes];
          for (int64_t i = 0; i < smaller(lanes, C - c); ++i) row[i] = joints[(c + i) * kFusionRows + r];
          store(joint + (first + r) * C + c, load(row), C - c);
        }
    }
  }
  T *scores = (T*)args->tensors[M + 5], *ratio = (T*)args->tensors[M + 6];
  if (!scores) return 0;                               // no labels; of an empty batch their address is null, too
  *args->outside = outside < N ? outside : -1;
  for (int64_t m = 0; m < M; ++m) {
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += partial.data[block * M + m];
    scores[m] = T(total);
  }
  T weakest = scores[0];
  for (int64_t m = 1; m < M; ++m) weakest = scores[m] < weakest || scores[m] != scores[m] ? scores[m] : weakest;
  for (int64_t m = 0; m < M; ++m) ratio[m] = scores[m] / weakest;
  return 0;
}

//   hidden weight grad_joint norm | grad_hidden grad_weight grad_bias
template <class S> static int cosine_fusion_backward(const CosineFusion* args) {
  using T = Compute<S>;
  constexpr int lanes = Lanes<T>::count, wide = 4;     // vectors of a tile of the weight gradient
  const Fusion<S> f(args);
  const int64_t M = f.M, N = f.N, D = f.D, C = f.C, width = f.padded_width, classes = f.padded_classes;
  const int64_t most = (N + kFusionChunks - 1) / kFusionChunks;
  const int64_t chunk = round_up(most > 2 * kFusionRows ? most : 2 * kFusionRows, kFusionRows);
  const int64_t chunks = N > 0 ? (N + chunk - 1) / chunk : 1;
  const int threads = f.threads(2);
  Scratch<T> weights(M * f.block()), weight_norms(M * (width > classes ? width : classes)), partial(f.block(), M * chunks);
  Scratch<T> factors(kFusionRows * classes, threads), mixed(kTall * width, threads), bias(classes, chunks);
  if (!weights.ok() || !weight_norms.ok() || !partial.ok() || !factors.ok() || !mixed.ok() || !bias.ok()) return 1;
  const int64_t norms_each = width > classes ? width : classes;
  const S* grad_joint = (const S*)args->tensors[M + 1];
  const T* norms = (const T*)args->tensors[M + 2];
  void* const* results = args->tensors + M + 3;
  S *grad_weight = (S*)results[M], *grad_bias = (S*)results[M + 1];

#pragma omp parallel num_threads(threads)
  {
    T *const factor = factors.of(omp_get_thread_num()), *const u = mixed.of(omp_get_thread_num());
#pragma omp for schedule(static)
    for (int64_t m = 0; m < M; ++m) {
      if (args->amw) f.take_unit(m, weights.data + m * f.block(), weight_norms.data + m * norms_each);
      else f.take(m, weights.data + m * f.block());
    }
#pragma omp for schedule(static)
    for (int64_t job = 0; job < M * chunks; ++job) {
      const int64_t m = job / chunks, part = job % chunks, last = smaller((part + 1) * chunk, N);
      const T* V = weights.data + m * f.block();
      T *const t = partial.of(int(job)), *const of_bias = bias.of(int(part));
      __builtin_memset(t, 0, size_t(f.block()) * sizeof(T));
      if (m == 0) __builtin_memset(of_bias, 0, size_t(classes) * sizeof(T));
      for (int64_t first = part * chunk; first < last; first += kFusionRows) {
        const int64_t height = smaller(kFusionRows, last - first);
        // factor[r][c] = s a G, or G without AMW
        for (int64_t r = 0; r < height; ++r) {
          const T length = norms[m * N + first + r], a = args->amw ? T(args->scale) * inverse<T>(broadcast(length))[0] : T(1);
          for (int64_t c = 0; c < classes; ++c) {
            const T g = c < C ? to_compute(grad_joint[(first + r) * C + c]) : T(0);
            factor[r * classes + c] = a * g;
            if (m == 0) of_bias[c] += g;
          }
        }
        // g_h = u - a^2 h (h . u),  u = factor V
        for (int64_t r = 0; r < height; r += kTall) {
          const S* row[kTall];
          const T* of_row[kTall];
          for (int i = 0; i < kTall; ++i) {
            const int64_t at = smaller(r + i, height - 1);
            row[i] = f.hidden(m, first + at);
            of_row[i] = factor + at * classes;
          }
          Vector<T> dots[kTall] = {};
          for (int64_t d = 0; d < D; d += lanes) {
            Vector<T> total[kTall] = {};
            for (int64_t c = 0; c < C; ++c) {
              const auto v = load(V + c * width + d);
#pragma GCC unroll 4
              for (int i = 0; i < kTall; ++i) total[i] += of_row[i][c] * v;
            }
#pragma GCC unroll 4
            for (int i = 0; i < kTall; ++i) {
              dots[i] += total[i] * load(row[i] + d, D - d);
              store(u + i * width + d, total[i]);
            }
          }
          for (int i = 0; i < smaller(kTall, height - r); ++i) {
            const T length = norms[m * N + first + r + i];
            const T along = args->amw && !(length < T(1e-12)) ? sum<T>(dots[i]) / (length * length) : T(0);
            S* out = (S*)results[m] + (first + r + i) * D;
            for (int64_t d = 0; d < D; d += lanes)
              store(out + d, load(u + i * width + d) - along * load(row[i] + d, D - d), D - d);
          }
        }
        // t += factor^T h
        for (int64_t d = 0; d < D; d += wide * lanes)
          for (int64_t c = 0; c < classes; c += kClasses) {
            Vector<T> total[kClasses][wide] = {};
            for (int64_t r = 0; r < height; ++r) {
              const S* row = f.hidden(m, first + r) + d;
              const T* of_row = factor + r * classes + c;
#pragma GCC unroll 4
              for (int v = 0; v < wide; ++v) {
                if (d + v * lanes >= D) break;
                const auto h = load(row + v * lanes, D - d - v * lanes);
#pragma GCC unroll 3
                for (int k = 0; k < kClasses; ++k) total[k][v] += of_row[k] * h;
              }
            }
            for (int k = 0; k < kClasses; ++k)
              for (int v = 0; v < wide && d + v * lanes < D; ++v) {
                T* to = t + (c + k) * width + d + v * lanes;
                store(to, load(to) + total[k][v]);
              }
          }
      }
    }
#pragma omp for schedule(static)
    for (int64_t job = 0; job < M * C; ++job) {
      const int64_t m = job / C, c = job % C;
      T* to = partial.of(int(m * chunks)) + c * width;
      for (int64_t d = 0; d < width; d += lanes) {
        auto total = load(to + d);
        for (int64_t part = 1; part < chunks; ++part) total += load(to + part * partial.each + d);
        store(to + d, total);
      }
    }
#pragma omp for schedule(static)
    for (int64_t m = 0; m < M; ++m) {
      const T *t = partial.of(int(m * chunks)), *V = weights.data + m * f.block(), *norm = weight_norms.data + m * norms_each;
      auto at = [&](int64_t c) { return grad_weight + (c * M + m) * D; };
      if (!args->amw) {
        for (int64_t c = 0; c < C; ++c)
          for (int64_t d = 0; d < D; d += lanes) store(at(c) + d, load(t + c * width + d), D - d);
      } else if (args->over_classes) {
        for (int64_t d = 0; d < D; d += lanes) {
          const auto length = load(norm + d), reciprocal = inverse<T>(length);
          Vector<T> along = {};
          for (int64_t c = 0; c < C; ++c) along += load(V + c * width + d) * load(t + c * width + d);
          along = length < T(1e-12) ? Vector<T>{} : along;
          for (int64_t c = 0; c < C; ++c) {
            const int64_t i = c * width + d;
            store(at(c) + d, reciprocal * (load(t + i) - along * load(V + i)), D - d);
          }
        }
      } else {
        for (int64_t c = 0; c < C; ++c) {
          const T *of_class = t + c * width, *v = V + c * width;
          const T reciprocal = inverse<T>(broadcast(norm[c]))[0];
          Vector<T> dot = {};
          for (int64_t d = 0; d < width; d += lanes) dot += load(v + d) * load(of_class + d);
          const T along = norm[c] < T(1e-12) ? T(0) : sum<T>(dot);
          for (int64_t d = 0; d < D; d += lanes) store(at(c) + d, reciprocal * (load(of_class + d) - along * load(v + d)), D - d);
        }
      }
    }
  }
  if (grad_bias)
    for (int64_t c = 0; c < C; ++c) {
      T total = 0;
      for (int64_t part = 0; part < chunks; ++part) total += bias.of(int(part))[c];
      store(grad_bias + c, broadcast(total), 1);
    }
  return 0;
}
