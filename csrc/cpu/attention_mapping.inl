// The L1 feature loss of one AFW layer; mathematics in ada2i_fast/ops/attention_mapping.py. Phi(x) of a tile never leaves the caches.

// What a tile adds to the loss: its sums Phi x against target(i, d, n), the vector of the target's row i at d, of which n are left. Signs go to
// sign [height][D].
template <class S, class P> struct MappingTile {
  using T = Compute<S>;
  const P* bias;
  int64_t D;
  int8_t* sign;
  Vector<T> total = {};

  // `columns` of row i from d on, whose sums lie at c.
  template <class F> ALWAYS_INLINE void add(int64_t i, int64_t d, int64_t columns, const T* c, F target) {
    constexpr int lanes = Lanes<T>::count;
    for (int64_t v = 0; v < columns; v += lanes) {
      const int64_t n = smaller(lanes, columns - v);
      auto difference = load(c + v, n) + load(bias + d + v, n) - target(i, d + v, n);
      total += absolute<T>(difference);
      store_signs<T>(sign + i * D + d + v, difference, n);
    }
  }
};
// All of it, from packed x and phi.
template <class S, class P, class F>
INLINE void mapping_tile(MappingTile<S, P>& tile, const Packed<S>* left, const Packed<S>* phi, int64_t height, F target) {
  multiply<Strips>(left, phi, tile.D, tile.D, [&](const Compute<S>* c, int64_t column, int64_t columns, int64_t from, int64_t to) {
    for (int64_t i = from; i < smaller(to, height); ++i) tile.add(i, column, columns, c + i * kColumns<Compute<S>>, target);
  });
}

// partial[j][tile], weighted.
INLINE double mapping_total(const double* coefficient, const double* partial, int64_t M, int64_t tiles) {
  double loss = 0;
  for (int64_t job = 0; job < M * tiles; ++job) loss += coefficient[job / tiles] * partial[job];
  return loss;
}

template <class S> static int attention_mapping_forward(const AttentionMapping* args) {
  using T = Compute<S>;
  using E = Packed<S>;
  const int64_t M = args->modalities, rows = args->rows, tiles = (rows + kHeight<E> - 1) / kHeight<E>;
  void* const* t = args->tensors;
  int64_t widest = 0, packed = 0, panels = 0, work = 0;
  for (int64_t j = 0; j < M; ++j) {
    const int64_t D = args->widths[j];
    if (D > widest) widest = D;
    packed += right_size<E>(D, D);
    work += rows * D * D;
  }
  panels = (widest + kColumns<T> - 1) / kColumns<T>;
  const int threads = useful_threads(args->threads, work);
  Scratch<E> right(packed), left(left_size<E>(widest), threads);
  Scratch<E*> phi(M);
  Scratch<double> partial(M * tiles);
  if (!right.ok() || !left.ok() || !phi.ok() || !partial.ok()) return 1;
  for (int64_t j = 0, at = 0; j < M; at += right_size<E>(args->widths[j], args->widths[j]), ++j) phi.data[j] = right.data + at;

#pragma omp parallel num_threads(threads)
  {
    E* tile_left = left.of(omp_get_thread_num());
#pragma omp for schedule(static)
    for (int64_t job = 0; job < M * panels; ++job) {
      const int64_t j = job / panels, column = job % panels * kColumns<T>, D = args->widths[j];
      const S* weight = (const S*)t[2 * M + j];
      if (column < D) pack_transposed(phi.data[j], [&](int64_t r) { return weight + r * D; }, D, D, column);
    }
#pragma omp for schedule(static)
    for (int64_t job = 0; job < M * tiles; ++job) {
      const int64_t j = job / tiles, first = job % tiles * kHeight<E>, height = smaller(kHeight<E>, rows - first), D = args->widths[j];
      const S* x = (const S*)t[j] + first * D;
      const S* target = (const S*)t[M + j] + first * D;
      MappingTile<S, S> tile{(const S*)t[3 * M + j], D, (int8_t*)t[4 * M + j] + first * D};
      pack_left_rows(tile_left, x, D, D, height);
      mapping_tile(tile, tile_left, phi.data[j], height, [&](int64_t i, int64_t d, int64_t n) { return load(target + i * D + d, n); });
      partial.data[job] = sum<T>(tile.total);
    }
  }
  *(T*)args->loss = T(mapping_total(args->coefficient, partial.data, M, tiles));
  return 0;
}

template <class S> static int attention_mapping_backward(const AttentionMapping* args) {
  using T = Compute<S>;
  using E = Packed<S>;
  constexpr int lanes = Lanes<T>::count, per = Step<E>::elements;
  const int64_t M = args->modalities, rows = args->rows, tiles = (rows + kHeight<E> - 1) / kHeight<E>;
  void* const* t = args->tensors;
  int64_t widest = 0, packed = 0, chunks = 0, totals = 0, work = 0;
  for (int64_t j = 0; j < M; ++j) {
    const int64_t D = args->widths[j];
    if (D > widest) widest = D;
    packed += right_size<E>(D, D);
    chunks = kTiles<E> ? right_size<E>(kChunk, widest + 1) : chunks + right_size<E>(kChunk, D + 1);
    totals += D * round_up(D + 1, kColumns<T>);
    work += 2 * rows * D * D;
  }
  const int threads = useful_threads(args->threads, work);
  const int64_t size = left_size<E>(widest);
  Scratch<E> right(packed), chunk(chunks, kTiles<E> ? threads : 1), left(size > kStrips<E> ? size : kStrips<E>, threads);
  Scratch<T> total(rows > kChunk ? totals : 0);
  Scratch<float> waiting(kRowSums<E>, threads);
  Scratch<E*> phi(M);
  Scratch<WeightGradient<S>> gradients(M);
  if (!right.ok() || !chunk.ok() || !left.ok() || !total.ok() || !waiting.ok() || !phi.ok() || !gradients.ok()) return 1;
  const T gradient = *(const T*)args->loss;
  int64_t at = 0, chunk_at = 0, total_at = 0;
  for (int64_t j = 0; j < M; ++j) {
    const int64_t D = args->widths[j];
    phi.data[j] = right.data + at;
    gradients.data[j] = {nullptr, (const int8_t*)t[M + j], (const S*)t[j], nullptr, D, D, (S*)t[5 * M + j], (S*)t[6 * M + j],
                         T(args->coefficient[j] * gradient), chunk.data + chunk_at, false, total.data + total_at};
    at += right_size<E>(D, D);
    if (!kTiles<E>) chunk_at += right_size<E>(kChunk, D + 1);
    total_at += rows > kChunk ? D * round_up(D + 1, kColumns<T>) : 0;
  }

#pragma omp parallel num_threads(threads)
  {
    E* tile_left = left.of(omp_get_thread_num());
    float* tile_sums = waiting.of(omp_get_thread_num());
    E* own_x = chunk.of(kTiles<E> ? omp_get_thread_num() : 0);
    const int64_t blocks = (widest + kBlock - 1) / kBlock;
#pragma omp for schedule(static)
    for (int64_t job = 0; job < M * blocks; ++job) {
      const int64_t j = job / blocks, first = job % blocks * kBlock, D = args->widths[j];
      const S* weight = (const S*)t[2 * M + j];
      for (int64_t k = first; k < smaller(first + kBlock, D); k += per) pack_weight_rows(phi.data[j], weight, D, D, k);
    }
#pragma omp for schedule(static)
    for (int64_t job = 0; job < M * tiles; ++job) {
      const int64_t j = job / tiles, first = job % tiles * kHeight<E>, height = smaller(kHeight<E>, rows - first), D = args->widths[j];
      const T factor = T(args->coefficient[j] * gradient);
      const int8_t* sign = (const int8_t*)t[M + j] + first * D;
      S* grad_x = (S*)t[3 * M + j] + first * D;
      S* grad_target = (S*)t[4 * M + j] + first * D;
      for (int i = 0; i < kHeight<E>; ++i)
        pack_left((PackedSigns<S>*)tile_left, i, D, [&](int64_t d, int64_t n) {
          if (i >= height) return Vector<T>{};
          auto s = load_signs<T>(sign + i * D + d, n);
          store(grad_target + i * D + d, -factor * s, n);
          return s;
        });
      multiply<Strips>((PackedSigns<S>*)tile_left, phi.data[j], D, D, [&](const T* c, int64_t column, int64_t columns, int64_t from, int64_t to) {
        for (int64_t i = from; i < smaller(to, height); ++i)
          for (int64_t v = 0; v < columns; v += lanes)
            store(grad_x + i * D + column + v, factor * load(c + i * kColumns<T> + v), columns - v);
      });
    }
    for (int64_t start = 0; start == 0 || start < rows; start += kChunk)
      weight_gradients(gradients.data, int(M), start, rows, tile_left, own_x, tile_sums);
  }
  return 0;
}
