// Tensor-ring attention, gate and dropout of one AFW layer; mathematics and names in ada2i_fast/ops/tensor_ring.py.
// R-vectors are padded with zeros to whole vectors (`padded`), R x R matrices have rows of that length.
// Loops over rows and over dialogues are divided the same way each time, in halves for two threads: then a thread finds in its own cache what it
// left there, x and what a pass over it gave.

constexpr int kMaxRank = 32;

template <class S> struct Ring {
  using T = Compute<S>;
  using E = Packed<S>;
  static constexpr int lanes = Lanes<T>::count;
  const TensorRing* args;
  int64_t M, R, padded, rows, tiles;
  Scratch<T> contracted;   // C_j[b], then its transpose, [M][B][2][R][padded]

  explicit Ring(const TensorRing* a)
      : args(a), M(a->modalities), R(a->rank), padded(round_up(R, lanes)), rows(a->rows), tiles((rows + kHeight<E> - 1) / kHeight<E>),
        contracted(M > 1 ? M * a->dialogues * 2 * R * padded : 0) {}

  T* C(int64_t j, int64_t b) const { return contracted.data + (j * args->dialogues + b) * 2 * R * padded; }
  T* transposed(int64_t j, int64_t b) const { return C(j, b) + R * padded; }

  int64_t length(int64_t b) const { return args->offsets[b + 1] - args->offsets[b]; }

  // The dialogue that row n belongs to: the last one that does not start after it and is not empty.
  int64_t dialogue(int64_t n) const {
    int64_t low = 0, high = args->dialogues - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (args->offsets[middle] <= n) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  // u = q1 k1 and v = q2 k2 of a row of projections.
  void factors(const T* projection, T* u, T* v) const {
    for (int64_t d = 0; d < padded; d += lanes) {
      const T* q = projection + d;
      store(u + d, load(q, R - d) * load(q + 2 * R, R - d));
      store(v + d, load(q + R, R - d) * load(q + 3 * R, R - d));
    }
  }

  // out = scale sum_i factor[i] matrix[i, :]
  void combine(const T* factor, const T* matrix, T scale, T* out) const {
    for (int64_t d = 0; d < padded; d += lanes) {
      Vector<T> even = {}, odd = {};
      int64_t i = 0;
      for (; i + 1 < R; i += 2) {
        even += factor[i] * load(matrix + i * padded + d);
        odd += factor[i + 1] * load(matrix + (i + 1) * padded + d);
      }
      if (i < R) even += factor[i] * load(matrix + i * padded + d);
      store(out + d, scale * (even + odd));
    }
  }

  // w = s C^T v
  void rotate(int64_t j, int64_t b, const T* v, T* w) const {
    if (M > 1) return combine(v, C(j, b), T(args->scale), w);
    for (int64_t d = 0; d < padded; d += lanes) store(w + d, T(args->scale) * load(v + d));
  }

  // u w^T, row by row without padding; writes up to a vector more.
  void outer(const T* u, const T* w, T* out) const {
    for (int64_t k = 0; k < R; ++k)
      for (int64_t d = 0; d < padded; d += lanes) store(out + k * R + d, u[k] * load(w + d));
  }

  // out = scale sum over the dialogue's rows of a b^T; pair(n, a, b) gives the two vectors of row n.
  template <class F> void outer_sum(int64_t b, T scale, T* out, F pair) const {
    alignas(64) T first[kMaxRank], second[kMaxRank];
    if (padded == lanes) {                          // all of it in registers; the factors are zero past the rank
      Vector<T> total[lanes] = {};
      for (int64_t n = args->offsets[b]; n < args->offsets[b + 1]; ++n) {
        pair(n, first, second);
        const auto v = load(second);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) total[i] += first[i] * v;
      }
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
        if (i < R) store(out + i * lanes, scale * total[i]);
      return;
    }
    for (int64_t i = 0; i < R * padded; ++i) out[i] = 0;
    for (int64_t n = args->offsets[b]; n < args->offsets[b + 1]; ++n) {
      pair(n, first, second);
      for (int64_t i = 0; i < R; ++i)
        for (int64_t d = 0; d < padded; d += lanes)
          store(out + i * padded + d, load(out + i * padded + d) + first[i] * load(second + d));
    }
    for (int64_t i = 0; i < R * padded; i += lanes) store(out + i, scale * load(out + i));
  }

  // g_u = S w and g_w = S^T u for a matrix S of R rows without padding. `vectors` in a row at most.
  template <int vectors> void contract_core(const T* S_rows, const T* u, const T* w, T* g_u, T* g_w) const {
    Vector<T> total[vectors] = {};
    for (int64_t first = 0; first < R; first += lanes) {
      Vector<T> part[lanes] = {};
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (first + i >= R) continue;
        for (int v = 0; v < vectors && v * lanes < R; ++v) {
          auto s = load(S_rows + (first + i) * R + v * lanes, R - v * lanes);
          total[v] += u[first + i] * s;
          part[i] += s * load(w + v * lanes);
        }
      }
      store(g_u + first, row_sums<T>(part));
    }
    for (int v = 0; v < vectors && v * lanes < R; ++v) store(g_w + v * lanes, total[v]);
  }

  // out = a b, all R x R; a with rows of `stride`.
  void product(const T* a, const T* b, T* out) const {
    for (int64_t i = 0; i < R; ++i) combine(a + i * padded, b, T(1), out + i * padded);
  }

  void transpose(const T* a, T* out) const {
    for (int64_t i = 0; i < R; ++i)
      for (int64_t o = 0; o < padded; ++o) out[i * padded + o] = o < R ? a[o * padded + i] : T(0);
  }

  void pad(const T* compact, T* out) const {
    for (int64_t i = 0; i < R; ++i)
      for (int64_t d = 0; d < padded; d += lanes) store(out + i * padded + d, load(compact + i * R + d, R - d));
  }

  // C_j[b] = A_l A_o .. from the saved means [B, R, R].
  template <class P> void contract(int64_t j, int64_t b, P const* means) const {
    alignas(64) T next[kMaxRank * kMaxRank], product_[kMaxRank * kMaxRank];
    const int64_t* order = args->ring + j * (M - 1);
    T* out = C(j, b);
    pad((const T*)means[order[0]] + b * R * R, out);
    for (int64_t i = 1; i < M - 1; ++i) {
      pad((const T*)means[order[i]] + b * R * R, next);
      product(out, next, product_);
      __builtin_memcpy(out, product_, size_t(R * padded) * sizeof(T));
    }
    transpose(out, transposed(j, b));
  }
};

// Weights are packed by all threads together; or, where there are no more threads than modalities, by each for itself: those of one modality after
// the other, in the same place, which stays in its cache. Then a modality is packed less than twice, on average.
INLINE bool pack_for_themselves(int64_t threads, int64_t modalities) { return threads <= modalities; }
// What one of them has packed: pieces of the weights of a modality, by pack(modality, piece).
template <class F> struct PackedForItself {
  F& pack;
  const bool used;
  int64_t modality = -1;
  void need(int64_t j, int64_t first, int64_t end) {
    if (!used || modality == j) return;
    for (int64_t piece = first; piece < end; ++piece) pack(j, piece);
    modality = j;
  }
};

// Behind the signs of a modality's rows, what dropout keeps of them: bit by bit, kColumns together, for backward, which need not draw it again.
// Not in double, of whose columns fewer go together than a byte has bits.
INLINE int64_t mark_stride(int64_t D) { return round_up(D, 64) / 8; }
template <int bytes> struct Bits { typedef uint8_t type; };
template <> struct Bits<2> { typedef uint16_t type; };
template <> struct Bits<4> { typedef uint32_t type; };
template <class T> struct Marks {
  static constexpr bool exist = sizeof(T) == 4;
  typedef typename Bits<kColumns<T> / 8>::type Some;
  static ALWAYS_INLINE void put(uint8_t* row, int64_t d, uint32_t bits) {
    const auto some = Some(bits);
    __builtin_memcpy(row + d / 8, &some, sizeof some);
  }
  static ALWAYS_INLINE uint32_t get(const uint8_t* row, int64_t d) {
    Some some;
    __builtin_memcpy(&some, row + d / 8, sizeof some);
    return some;
  }
};

template <class S, class P> static int tensor_ring_forward(const TensorRing* args) {
  using T = Compute<S>;
  using E = Packed<S>;
  constexpr int lanes = Lanes<T>::count;
  Ring<S> ring(args);
  const int64_t M = ring.M, R = ring.R, rows = ring.rows, tiles = ring.tiles, B = args->dialogues;
  enum { X, PROJ_WEIGHT, PROJ_BIAS = 5, MAP = 9, MAP_BIAS, OUT, TARGET, PROJ, MEAN, ATTENTION, PHI, PHI_BIAS, SIGN };
  void* const* t = args->tensors;
  const bool saving = t[PROJ * M] != nullptr, mapping = args->coefficient != nullptr, gated_target = args->gated_target;
  int64_t widest = 0, packed = 0, largest = 0, work = 0;
  for (int64_t j = 0; j < M; ++j) {
    const int64_t D = args->widths[j];
    if (D > widest) widest = D;
    const int64_t size = right_size<E>(D, 4 * R) + right_size<E>(R * R, D) + (mapping ? right_size<E>(D, D) : 0);
    packed += size;
    if (size > largest) largest = size;
    work += rows * D * (4 * R + R * R + (mapping ? D : 0));
  }
  const int threads = useful_threads(args->threads, work);
  const bool own = pack_for_themselves(threads, M);
  Scratch<E> right(own ? largest : packed, own ? threads : 1), left(left_size<E>(widest > R * R ? widest : R * R), threads);
  Scratch<T> outer(R * R + ring.padded, threads), spare(saving ? 0 : M * (rows * 4 * R + B * R * R));
  const int64_t stacked = round_up(4 * R, kColumns<T>), tile_row = round_up(widest, kColumns<T>);
  Scratch<T> bias_of(M * stacked), tile_sums((mapping ? 2 : 1) * kHeight<E> * tile_row, threads);
  Scratch<double> partial(mapping ? M * tiles : 0);
  Scratch<E*> projection(M), map(M), phi(M);
  Scratch<T*> saved(2 * M);                                    // projections and means
  if (!ring.contracted.ok() || !right.ok() || !left.ok() || !outer.ok() || !saved.ok() || !spare.ok() || !projection.ok() || !map.ok() ||
      !bias_of.ok() || !tile_sums.ok() || !partial.ok() || !phi.ok())
    return 1;
  E* next = right.data;
  for (int64_t j = 0; j < M; ++j) {
    if (own) next = right.data;                                // and of(thread) - data from there
    projection.data[j] = next;
    next += right_size<E>(args->widths[j], 4 * R);
    map.data[j] = next;
    next += right_size<E>(R * R, args->widths[j]);
    phi.data[j] = next;
    next += mapping ? right_size<E>(args->widths[j], args->widths[j]) : 0;
    saved.data[j] = saving ? (T*)t[PROJ * M + j] : spare.data + j * rows * 4 * R;
    saved.data[M + j] = saving ? (T*)t[MEAN * M + j] : spare.data + M * rows * 4 * R + j * B * R * R;
    for (int64_t r = 0; r < 4 * R; ++r) bias_of.data[j * stacked + r] = to_compute(((const P*)t[PROJ_BIAS * M + 4 * j + r / R])[r % R]);
  }
  const int64_t projection_panels = (4 * R + kColumns<T> - 1) / kColumns<T>, wide_panels = (widest + kColumns<T> - 1) / kColumns<T>;
  const int64_t panels = projection_panels + (mapping ? 2 : 1) * wide_panels;
  const T beta = T(args->beta), kept = T(1.0 / (1.0 - args->dropout));
  const uint32_t threshold = dropout_threshold(args->dropout);
  const bool dropping = args->dropout > 0;
  const uint64_t seed = dropping ? uint64_t(*args->seed) : 0;

#pragma omp parallel num_threads(threads) \
    firstprivate(M, R, beta, kept, threshold, dropping, mapping, gated_target, seed)   // a copy stays in registers
  {
    E* tile_left = left.of(omp_get_thread_num());
    T *attended = tile_sums.of(omp_get_thread_num()), *mapped = attended + kHeight<E> * tile_row;
    T* outer_row = outer.of(omp_get_thread_num());
    const int64_t mine = own ? right.of(omp_get_thread_num()) - right.data : 0;
    auto pack = [&](int64_t j, int64_t panel) __attribute__((always_inline)) {
      const int64_t wide = panel - projection_panels, D = args->widths[j], column = wide % wide_panels * kColumns<T>;
      const P *weight = (const P*)t[MAP * M + j], *phi_weight = mapping ? (const P*)t[PHI * M + j] : nullptr;
      auto projections = [&](int64_t r) { return (const P*)t[PROJ_WEIGHT * M + 4 * j + r / R] + r % R * D; };
      if (wide < 0) pack_transposed(projection.data[j] + mine, projections, D, 4 * R, panel * kColumns<T>);
      else if (column >= D) return;
      else if (wide < wide_panels) pack_transposed(map.data[j] + mine, [&](int64_t r) { return weight + r * R * R; }, R * R, D, column);
      else pack_transposed(phi.data[j] + mine, [&](int64_t r) { return phi_weight + r * D; }, D, D, column);
    };
    PackedForItself<decltype(pack)> weights{pack, own};
    if (!own) {
#pragma omp for schedule(static)
      for (int64_t job = 0; job < M * panels; ++job) pack(job / panels, job % panels);
    }

    // q1 q2 k1 k2
#pragma omp for schedule(static)
    for (int64_t job = 0; job < M * tiles; ++job) {
      const int64_t j = job / tiles, first = job % tiles * kHeight<E>, height = smaller(kHeight<E>, rows - first), D = args->widths[j];
      const S* x = (const S*)t[j] + first * D;
      const T* bias = bias_of.data + j * stacked;
      T* out = saved.data[j] + first * 4 * R;
      weights.need(j, 0, projection_panels);
      pack_left_rows(tile_left, x, D, D, height);
      multiply<Strips>(tile_left, projection.data[j] + mine, D, 4 * R, [&](const T* c, int64_t column, int64_t columns, int64_t from, int64_t to) {
        if (column == 0) ask(x + (kHeight<E> + from) * D, (to - from) * D);            // the next tile's
        for (int64_t i = from; i < smaller(to, height); ++i)
          for (int64_t v = 0; v < columns; v += lanes)
            store(out + i * 4 * R + column + v, load(c + i * kColumns<T> + v) + load(bias + column + v, columns - v), columns - v);
      });
    }

    // A_j[b], then C_j[b]
#pragma omp for schedule(static)
    for (int64_t job = 0; job < M * B; ++job) {
      const int64_t j = job / B, b = job % B;
      alignas(64) T mean[kMaxRank * kMaxRank];
      const int64_t n_b = ring.length(b);
      ring.outer_sum(b, n_b > 0 ? T(args->scale / double(n_b)) : T(0), mean,
                     [&](int64_t n, T* u, T* v) { ring.factors(saved.data[j] + n * 4 * R, u, v); });
      T* A = saved.data[M + j] + b * R * R;
      for (int64_t i = 0; i < R; ++i)
        for (int64_t d = 0; d < R; d += lanes) store(A + i * R + d, load(mean + i * ring.padded + d), R - d);
    }
    if (M > 1) {
#pragma omp for schedule(static)
      for (int64_t job = 0; job < M * B; ++job) ring.contract(job / B, job % B, saved.data + M);
    }

    // the bilinear map, whose left operand u w^T is made here, and the gate; then the loss, while its target is in cache
    weights.modality = -1;
#pragma omp for schedule(static)
    for (int64_t job = 0; job < M * tiles; ++job) {
      const int64_t j = job / tiles, first = job % tiles * kHeight<E>, height = smaller(kHeight<E>, rows - first), D = args->widths[j];
      const S* x = (const S*)t[j] + first * D;
      const P* bias = (const P*)t[MAP_BIAS * M + j];
      S* out = (S*)t[OUT * M + j] + first * D;
      S* target = t[TARGET * M + j] ? (S*)t[TARGET * M + j] + first * D : nullptr;
      S* attention = saving ? (S*)t[ATTENTION * M + j] + first * D : nullptr;
      weights.need(j, projection_panels, panels);
      int64_t b = ring.dialogue(first);
      for (int i = 0; i < kHeight<E>; ++i) {
        if (i < height) {
          alignas(64) T u[kMaxRank], v[kMaxRank], w[kMaxRank];
          while (args->offsets[b + 1] <= first + i) ++b;
          ring.factors(saved.data[j] + (first + i) * 4 * R, u, v);
          ring.rotate(j, b, v, w);
          ring.outer(u, w, outer_row);
        }
        pack_left(tile_left, i, R * R, [&](int64_t d, int64_t n) { return i < height ? load(outer_row + d, n) : Vector<T>{}; });
      }
      int8_t* sign = mapping ? (int8_t*)t[SIGN * M + j] + first * D : nullptr;
      uint8_t* marks = mapping ? (uint8_t*)t[SIGN * M + j] + rows * D + first * mark_stride(D) : nullptr;
      // `columns` of row i from d on, whose sums lie at c. The target goes where they are, or would be, among all of the tile's.
      auto gate = [=](int64_t i, int64_t d, int64_t columns, const T* c) __attribute__((always_inline)) {
        const int64_t coming = (i + kHeight<E>) * D + d;      // in the next tile
        ask(x + coming, kColumns<T>);
        ask(out + coming, kColumns<T>);
        if (attention) ask(attention + coming, kColumns<T>);
        if (mapping) ask(sign + coming, kColumns<T>);
        uint32_t bits = 0;
        if (dropping) {
          bits = kept_columns<T, kColumns<T>>(seed, first + i, uint32_t(j), d, threshold);
          if (Marks<T>::exist && mapping) Marks<T>::put(marks + i * mark_stride(D), d, bits);
        }
        for (int64_t v = 0; v < columns; v += lanes) {
          const int64_t n = columns - v, at = i * D + d + v;
          auto att = load(c + v) + load(bias + d + v, n);
          auto x_n = load(x + at, n);
          auto gated = att * x_n + beta * x_n;
          if (attention) store(attention + at, att, n);
          if (target) store(target + at, gated, n);
          if (mapping) store(sums_at<E>(attended, i, d + v), gated_target ? gated : att);
          if (dropping) gated = keep(gated, bits >> v, kept);
          store(out + at, gated, n);
        }
      };
      auto target_at = [=](int64_t i, int64_t d, int64_t n) __attribute__((always_inline)) { return load((const T*)sums_at<E>(attended, i, d), n); };
      MappingTile<S, P> loss{mapping ? (const P*)t[PHI_BIAS * M + j] : nullptr, D, sign};
      if (kBesideTiles<E, E> && mapping) {
        // Beside Phi, whose tiles take longer, and by rows, which memory likes better.
        Nothing nothing;
        multiply_beside<Strips>(tile_left, map.data[j] + mine, R * R, D, attended, nothing);
        pack_left_rows(tile_left, x, D, D, height);
        auto piece = [=](int64_t i, int64_t d) __attribute__((always_inline)) { gate(i, d, smaller(kColumns<T>, D - d), sums_at<E>(attended, i, d)); };
        RowByRow<decltype(piece)> gates{piece, D, kColumns<T>};
        Beside<decltype(gates)> beside{gates, gates.pieces(height), slots_beside<E, E>(D, D)};
        multiply_beside<Strips>(tile_left, phi.data[j] + mine, D, D, mapped, beside);
        beside.finish();
        for (int64_t d = 0; d < D; d += kColumns<T>)          // the order of mapping_tile
          for (int64_t i = 0; i < height; ++i) loss.add(i, d, smaller(kColumns<T>, D - d), sums_at<E>(mapped, i, d), target_at);
      } else {
        multiply<Strips>(tile_left, map.data[j] + mine, R * R, D, [&](const T* c, int64_t column, int64_t columns, int64_t from, int64_t to) {
          for (int64_t i = from; i < smaller(to, height); ++i) gate(i, column, columns, c + i * kColumns<T>);
        });
        if (mapping) {
          pack_left_rows(tile_left, x, D, D, height);
          mapping_tile(loss, tile_left, phi.data[j] + mine, height, target_at);
        }
      }
      if (mapping) partial.data[job] = sum<T>(loss.total);
    }
  }
  if (mapping) *(T*)args->loss = T(mapping_total(args->coefficient, partial.data, M, tiles));
  return 0;
}

// P: the type of parameters and of their gradients.
template <class S, class P> static int tensor_ring_backward(const TensorRing* args) {
  using T = Compute<S>;
  using E = Packed<S>;
  constexpr int lanes = Lanes<T>::count, per = Step<E>::elements;
  Ring<S> ring(args);
  const int64_t M = ring.M, R = ring.R, padded = ring.padded, rows = ring.rows, B = args->dialogues;
  const int64_t matrix = R * padded;
  enum { X, PROJ_WEIGHT, MAP = 5, PROJ, MEAN, ATTENTION, GRAD_OUT, GRAD_TARGET, GRAD_X, GRAD_PROJ_WEIGHT, GRAD_PROJ_BIAS, GRAD_MAP,
         GRAD_MAP_BIAS, PHI, SIGN, GRAD_PHI, GRAD_PHI_BIAS };
  void* const* t = args->tensors;
  const bool mapping = args->coefficient != nullptr;
  int64_t widest = R * R > 4 * R ? R * R : 4 * R, packed = 0, largest = 0, totals = 0, columns_of_all = 0, work = 0;
  for (int64_t j = 0; j < M; ++j) {
    const int64_t D = args->widths[j];
    if (D > widest) widest = D;
    const int64_t size = right_size<E>(D, R * R) + right_size<E>(4 * R, D) + (mapping ? right_size<E>(D, D) : 0);
    packed += size;
    if (size > largest) largest = size;
    totals += D * round_up(R * R + 1, kColumns<T>) + (4 * R + (mapping ? D : 0)) * round_up(D + 1, kColumns<T>);
    columns_of_all += D + 4 * R;
    work += 2 * rows * D * (4 * R + R * R + (mapping ? D : 0));
  }
  const int threads = useful_threads(args->threads, work);
  const int64_t row_size = R * R + padded, sums_size = R * R + kColumns<T> + padded, left_most = left_size<E>(widest);
  const bool own = pack_for_themselves(threads, M);
  Scratch<E> right(own ? largest : packed, own ? threads : 1), left(left_most > kStrips<E> ? left_most : kStrips<E>, threads);
  // g_att [rows, D], then that of the projections [rows, 4R], per modality: of one pass, so they stay in cache however many rows there are.
  Scratch<Operand<S>> gradient(smaller(rows, kChunk) * columns_of_all);
  Scratch<float> waiting(kRowSums<E>, threads);
  Scratch<T> total(rows > kChunk ? totals : 0), row(per * row_size, threads), sums(kHeight<E> * sums_size, threads);
  // u w^T of one pass, for the gradient of the map: rows as they are, packed by whoever needs them, or packed at once.
  const int64_t outer_size = kTiles<E> ? smaller(rows, kChunk) * R * R : 0;
  Scratch<Operand<S>> outer(M * outer_size);
  Scratch<E> outer_packed(kTiles<E> ? 0 : M * right_size<E>(kChunk, R * R + 1));
  Scratch<T> g_u(M * rows * padded), g_w(M * rows * padded);
  Scratch<T> g_A(M > 1 ? M * B * 2 * matrix : 0), g_C(M > 1 ? M * B * matrix : 0);
  const int64_t tile_row = round_up(widest, kColumns<T>);
  Scratch<T> tile_direct(kHeight<E> * tile_row, threads), tile_mapped(mapping ? kHeight<E> * tile_row : 0, threads);
  Scratch<PackedSigns<S>> tile_signs(mapping ? left_size<PackedSigns<S>>(widest) : 0, threads);
  Scratch<E*> map(M), projection(M), phi(M);
  const int64_t of_x = mapping ? 2 : 1;                        // gradients with x as their right operand; those of the map come before them all
  Scratch<WeightGradient<S, P>> gradients((1 + of_x) * M);
  Scratch<E> x_packed(right_size<E>(kChunk, widest + 1), kTiles<E> ? threads : 1);
  if (!ring.contracted.ok() || !right.ok() || !left.ok() || !gradient.ok() || !total.ok() || !waiting.ok() || !row.ok() || !sums.ok() ||
      !g_u.ok() || !g_w.ok() || !g_A.ok() || !g_C.ok() || !map.ok() || !projection.ok() || !gradients.ok() || !outer.ok() || !outer_packed.ok() ||
      !tile_direct.ok() || !tile_mapped.ok() || !tile_signs.ok() || !phi.ok() || !x_packed.ok())
    return 1;
  E *right_at = right.data, *outer_at = outer_packed.data;
  Operand<S>* gradient_at = gradient.data;
  T* total_at = total.data;
  const T loss_gradient = mapping ? *(const T*)args->loss : T(0);
  for (int64_t j = 0; j < M; ++j) {
    const int64_t D = args->widths[j];
    if (own) right_at = right.data;
    map.data[j] = right_at;
    right_at += right_size<E>(D, R * R);
    projection.data[j] = right_at;
    right_at += right_size<E>(4 * R, D);
    auto add = [&](int64_t index, const void* rows_of, int64_t m, int64_t n, void* weight, void* bias, E* packed) {
      gradients.data[index] = {gradient_at, nullptr, (const S*)rows_of, rows_of ? nullptr : outer.data + j * outer_size, m, n, (P*)weight, (P*)bias,
                               T(1), packed, !rows_of, total_at};
      gradient_at += smaller(rows, kChunk) * m;
      if (rows > kChunk) total_at += m * round_up(n + 1, kColumns<T>);
    };
    add(j, nullptr, D, R * R, t[GRAD_MAP * M + j], t[GRAD_MAP_BIAS * M + j], outer_at);
    if (!kTiles<E>) outer_at += right_size<E>(kChunk, R * R + 1);
    add(M + j * of_x, t[X * M + j], 4 * R, D, t[GRAD_PROJ_WEIGHT * M + j], t[GRAD_PROJ_BIAS * M + j], x_packed.data);
    if (!mapping) continue;
    phi.data[j] = right_at;
    right_at += right_size<E>(D, D);
    gradients.data[M + j * of_x + 1] = {nullptr, (const int8_t*)t[SIGN * M + j], (const S*)t[X * M + j], nullptr, D, D, (P*)t[GRAD_PHI * M + j],
                                 (P*)t[GRAD_PHI_BIAS * M + j], T(args->coefficient[j] * loss_gradient), x_packed.data, true,
                                 total_at};
    if (rows > kChunk) total_at += D * round_up(D + 1, kColumns<T>);
  }
  const T beta = T(args->beta), scale = T(args->scale), kept = T(1.0 / (1.0 - args->dropout));
  const uint32_t threshold = dropout_threshold(args->dropout);
  const bool dropping = args->dropout > 0, gated_target = args->gated_target;
  const uint64_t seed = dropping ? uint64_t(*args->seed) : 0;
  auto proj = [&](int64_t j, int64_t n) { return (const T*)t[PROJ * M + j] + n * 4 * R; };
  auto row_of = [&](const Scratch<T>& all, int64_t j, int64_t n) { return all.data + (j * rows + n) * padded; };

#pragma omp parallel num_threads(threads) firstprivate(M, R, padded, beta, kept, threshold, dropping, gated_target, mapping, seed)
  {
    E* tile_left = left.of(omp_get_thread_num());
    float* tile_sums = waiting.of(omp_get_thread_num());
    E* own_x = x_packed.of(kTiles<E> ? omp_get_thread_num() : 0);
    T* outer_rows = row.of(omp_get_thread_num());
    T* S_rows = sums.of(omp_get_thread_num());
    T *direct = tile_direct.of(omp_get_thread_num()), *mapped = tile_mapped.of(omp_get_thread_num());
    PackedSigns<S>* signs = tile_signs.of(omp_get_thread_num());
    const int64_t mine = own ? right.of(omp_get_thread_num()) - right.data : 0;
    const int64_t projection_blocks = (4 * R + kBlock - 1) / kBlock, blocks = projection_blocks + (widest + kBlock - 1) / kBlock;
    auto pack = [&](int64_t j, int64_t block) __attribute__((always_inline)) {
      const int64_t D = args->widths[j];
      auto projections = [&](int64_t r) { return r < 4 * R ? (const P*)t[PROJ_WEIGHT * M + 4 * j + r / R] + r % R * D : nullptr; };
      if (block < projection_blocks) {
        for (int64_t k = block * kBlock; k < smaller((block + 1) * kBlock, 4 * R); k += per)
          pack_right(projection.data[j] + mine, k, 4 * R, D, projections(k), projections(k + 1), false);
        return;
      }
      const int64_t first = (block - projection_blocks) * kBlock;
      for (int64_t k = first; k < smaller(first + kBlock, D); k += per) {
        pack_weight_rows(map.data[j] + mine, (const P*)t[MAP * M + j], D, R * R, k);
        if (mapping) pack_weight_rows(phi.data[j] + mine, (const P*)t[PHI * M + j], D, D, k);
      }
    };
    PackedForItself<decltype(pack)> weights{pack, own};
    if (!own) {
#pragma omp for schedule(static)
      for (int64_t job = 0; job < M * blocks; ++job) pack(job / blocks, job % blocks);
    }
    if (M > 1) {
#pragma omp for schedule(static)
      for (int64_t job = 0; job < M * B; ++job) ring.contract(job / B, job % B, t + MEAN * M);
    }

    // g_att and the direct part of g_x, with the loss's; then S = g_att W, contracted with w and u while it is in cache
    for (int64_t start = 0; start == 0 || start < rows; start += kChunk) {
      const int64_t here = smaller(kChunk, rows - start), passed = (here + kHeight<E> - 1) / kHeight<E>;
#pragma omp for schedule(static)
      for (int64_t job = 0; job < M * passed; ++job) {
        const int64_t j = job / passed, place = job % passed * kHeight<E>, first = start + place, height = smaller(kHeight<E>, here - place);
        const int64_t D = args->widths[j];
        const S* x = (const S*)t[j] + first * D;
        weights.need(j, projection_blocks, blocks);
        const S* attention = (const S*)t[ATTENTION * M + j] + first * D;
        const S* grad_out = (const S*)t[GRAD_OUT * M + j] + first * D;
        const S* grad_target = t[GRAD_TARGET * M + j] ? (const S*)t[GRAD_TARGET * M + j] + first * D : nullptr;
        const int8_t* sign = mapping ? (const int8_t*)t[SIGN * M + j] + first * D : nullptr;
        const uint8_t* marks = mapping ? (const uint8_t*)t[SIGN * M + j] + rows * D + first * mark_stride(D) : nullptr;
        const T factor = mapping ? gradients.data[M + j * of_x + 1].scale : T(0);
        S* grad_x = (S*)t[GRAD_X * M + j] + first * D;
        auto g_att = (Operand<S>*)gradients.data[j].left + place * D;
        // g_att, as it is and packed, and the direct part of g_x.
        auto gate = [=](int64_t i, int64_t d) __attribute__((always_inline)) {
          constexpr int64_t some = Lanes<Word<E>>::count * per;
          const int64_t coming = (i + kHeight<E>) * D + d;    // in the next tile
          ask(x + coming, kColumns<T>);
          ask(grad_out + coming, kColumns<T>);
          ask(attention + coming, kColumns<T>);
          ask(grad_x + coming, kColumns<T>);
          ask(g_att + coming, kColumns<T>);
          if (mapping) ask(sign + coming, kColumns<T>);
          uint32_t bits = 0;
          if (dropping && i < height) {
            if (Marks<T>::exist && mapping) bits = Marks<T>::get(marks + i * mark_stride(D), d);
            else bits = kept_columns<T, kColumns<T>>(seed, first + i, uint32_t(j), d, threshold);
          }
#pragma GCC unroll 4
          for (int64_t v = 0; v < kColumns<T>; v += some) {
            if (d + v >= D) break;
            put_left(tile_left, int(i), d + v, steps_from((E*)0, d + v, D - d - v, [&](int64_t column) __attribute__((always_inline)) {
              if (i >= height) return Vector<T>{};
              const int64_t at = i * D + column, n = D - column;
              auto g = load(grad_out + at, n);
              auto target = grad_target ? load(grad_target + at, n) : Vector<T>{};
              if (mapping) target -= factor * load_signs<T>(sign + at, n);
              if (dropping) g = keep(g, bits >> (column - d), kept);
              if (gated_target) g += target;
              auto att = g * load(x + at, n);
              if (!gated_target) att += target;
              store(direct + i * tile_row + column, g * (load(attention + at, n) + beta));
              store(g_att + at, att, n);
              return att;
            }));
          }
        };
        RowByRow<decltype(gate)> gates{gate, D, kColumns<T>};
        Beside<decltype(gates)> beside{gates, gates.pieces(kHeight<E>), slots_beside<PackedSigns<S>, E>(D, D)};
        if (mapping) {
          for (int i = 0; i < kHeight<E>; ++i)
            pack_left(signs, i, D, [&](int64_t d, int64_t n) { return i < height ? load_signs<T>(sign + i * D + d, n) : Vector<T>{}; });
          multiply_beside<Strips>(signs, phi.data[j] + mine, D, D, mapped, beside);
        }
        beside.finish();
        for (int64_t i = 0; i < height; ++i)
          for (int64_t d = 0; d < D; d += lanes) {
            auto sum = load(direct + i * tile_row + d);
            if (mapping) sum += factor * load(sums_at<E>(mapped, i, d));
            store(grad_x + i * D + d, sum, D - d);
          }
        multiply<Strips>(tile_left, map.data[j] + mine, D, R * R, [&](const T* c, int64_t column, int64_t, int64_t from, int64_t to) {
          for (int64_t i = from; i < smaller(to, height); ++i)
            for (int v = 0; v < kColumns<T>; v += lanes) store(S_rows + i * sums_size + column + v, load(c + i * kColumns<T> + v));
        });
        int64_t b = ring.dialogue(first);
        for (int i = 0; i < height; ++i) {
          alignas(64) T u[kMaxRank], v[kMaxRank], w[kMaxRank];
          while (args->offsets[b + 1] <= first + i) ++b;
          ring.factors(proj(j, first + i), u, v);
          ring.rotate(j, b, v, w);
          T *gu = row_of(g_u, j, first + i), *gw = row_of(g_w, j, first + i);
          if (padded == lanes) ring.template contract_core<1>(S_rows + i * sums_size, u, w, gu, gw);
          else ring.template contract_core<kMaxRank / lanes>(S_rows + i * sums_size, u, w, gu, gw);
          // u w^T, the right operand of the map's gradient; where it is packed at once, two rows make a step
          T* outer_row = outer_rows + i % per * row_size;
          ring.outer(u, w, outer_row);
          if constexpr (kTiles<E>) {
            Operand<S>* to = outer.data + j * outer_size + (place + i) * R * R;
            for (int64_t d = 0; d < R * R; d += lanes) store(to + d, load(outer_row + d), R * R - d);
          } else if (i % per == per - 1 || i + 1 == height) {
            pack_right(gradients.data[j].right, place + i / per * per, here, R * R, (const T*)outer_rows, i % per ? (const T*)outer_row : nullptr, true);
          }
        }
      }
      weight_gradients(gradients.data, int(M), start, rows, tile_left, own_x, tile_sums);
    }

    // g_A, through the product rule around the ring
    if (M > 1) {
#pragma omp for schedule(static)
      for (int64_t job = 0; job < M * B; ++job) {
        const int64_t j = job / B, b = job % B;
        ring.outer_sum(b, scale, g_C.data + job * matrix, [&](int64_t n, T* v, T* gw) {
          alignas(64) T u[kMaxRank];
          ring.factors(proj(j, n), u, v);
          __builtin_memcpy(gw, row_of(g_w, j, n), size_t(padded) * sizeof(T));
        });
      }
#pragma omp for schedule(static)
      for (int64_t b = 0; b < B; ++b) {
        auto at = [&](int64_t j) { return g_A.data + (j * B + b) * 2 * matrix; };
        for (int64_t j = 0; j < M; ++j)
          for (int64_t i = 0; i < matrix; ++i) at(j)[i] = 0;
        for (int64_t j = 0; j < M; ++j) {
          // C = A_1 .. A_m:  g_A_i += (A_1 .. A_{i-1})^T g_C (A_{i+1} .. A_m)^T. `front` is the first factor times g_C, and loses one
          // matrix from its left after the other; the tail is built anew each time, for M is small.
          alignas(64) T front[kMaxRank * kMaxRank], tail[kMaxRank * kMaxRank], a[kMaxRank * kMaxRank], flipped[kMaxRank * kMaxRank];
          alignas(64) T spare[kMaxRank * kMaxRank];
          const int64_t* order = args->ring + j * (M - 1);
          auto mean = [&](int64_t i) { ring.pad((const T*)t[MEAN * M + order[i]] + b * R * R, a); };
          __builtin_memcpy(front, g_C.data + (j * B + b) * matrix, size_t(matrix) * sizeof(T));
          for (int64_t i = 0; i < M - 1; ++i) {
            __builtin_memcpy(tail, front, size_t(matrix) * sizeof(T));
            for (int64_t l = M - 2; l > i; --l) {
              mean(l);
              ring.transpose(a, flipped);
              ring.product(tail, flipped, spare);
              __builtin_memcpy(tail, spare, size_t(matrix) * sizeof(T));
            }
            for (int64_t d = 0; d < matrix; d += lanes) store(at(order[i]) + d, load(at(order[i]) + d) + load(tail + d));
            mean(i);
            ring.transpose(a, flipped);
            ring.product(flipped, front, spare);
            __builtin_memcpy(front, spare, size_t(matrix) * sizeof(T));
          }
        }
        for (int64_t j = 0; j < M; ++j) ring.transpose(at(j), at(j) + matrix);
      }
    }

    // gradients of u, v and the projections; the indirect part of g_x
    weights.modality = -1;
    for (int64_t start = 0; start == 0 || start < rows; start += kChunk) {
      const int64_t here = smaller(kChunk, rows - start), passed = (here + kHeight<E> - 1) / kHeight<E>;
#pragma omp for schedule(static)
      for (int64_t job = 0; job < M * passed; ++job) {
        const int64_t j = job / passed, place = job % passed * kHeight<E>, first = start + place, height = smaller(kHeight<E>, here - place);
        const int64_t D = args->widths[j];
        S* grad_x = (S*)t[GRAD_X * M + j] + first * D;
        weights.need(j, 0, projection_blocks);
        auto g_proj = (Operand<S>*)gradients.data[M + j * of_x].left + place * 4 * R;
        int64_t b = ring.dialogue(first);
        for (int i = 0; i < height; ++i) {
          alignas(64) T u[kMaxRank], v[kMaxRank], gu[kMaxRank], gv[kMaxRank], more[kMaxRank];
          while (args->offsets[b + 1] <= first + i) ++b;
          ring.factors(proj(j, first + i), u, v);
          __builtin_memcpy(gu, row_of(g_u, j, first + i), size_t(padded) * sizeof(T));
          const T* gw = row_of(g_w, j, first + i);
          if (M > 1) {
            const T share = T(args->scale / double(ring.length(b)));
            const T* g_mean = g_A.data + (j * B + b) * 2 * matrix;
            ring.combine(gw, ring.transposed(j, b), scale, gv);
            ring.combine(u, g_mean, share, more);
            for (int64_t d = 0; d < padded; d += lanes) store(gv + d, load(gv + d) + load(more + d));
            ring.combine(v, g_mean + matrix, share, more);
            for (int64_t d = 0; d < padded; d += lanes) store(gu + d, load(gu + d) + load(more + d));
          } else {
            for (int64_t d = 0; d < padded; d += lanes) store(gv + d, scale * load(gw + d));
          }
          const T* q = proj(j, first + i);
          Operand<S>* g = g_proj + i * 4 * R;
          for (int64_t d = 0; d < R; d += lanes) {
            const int64_t n = R - d;
            store(g + d, load(gu + d) * load(q + 2 * R + d, n), n);
            store(g + R + d, load(gv + d) * load(q + 3 * R + d, n), n);
            store(g + 2 * R + d, load(gu + d) * load(q + d, n), n);
            store(g + 3 * R + d, load(gv + d) * load(q + R + d, n), n);
          }
        }
        pack_left_rows(tile_left, (const Operand<S>*)g_proj, 4 * R, 4 * R, height);
        multiply<Strips>(tile_left, projection.data[j] + mine, 4 * R, D, [&](const T* c, int64_t column, int64_t columns, int64_t from, int64_t to) {
          // These few products are soon done: what the next ones are added to is fetched now.
          for (int64_t i = from; i < smaller(to, height); ++i)
            for (int64_t v = columns; v < 2 * columns; v += 64 / int64_t(sizeof(S))) __builtin_prefetch(grad_x + i * D + column + v, 1);
          for (int64_t i = from; i < smaller(to, height); ++i)
            for (int64_t v = 0; v < columns; v += lanes) {
              S* out = grad_x + i * D + column + v;
              store(out, load((const S*)out, columns - v) + load(c + i * kColumns<T> + v), columns - v);
            }
        });
      }
      // All at once, for threads with tiles, which pack x for themselves; else one modality after the other: its packed x stays in the caches.
      const int64_t together = kTiles<E> ? M : 1;
      for (int64_t j = 0; j < M; j += together)
        weight_gradients(gradients.data + M + j * of_x, int(together * of_x), start, rows, tile_left, own_x, tile_sums);
    }
  }
  return 0;
}
