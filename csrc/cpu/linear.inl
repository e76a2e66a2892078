// A linear map of rows by a weight in float, which becomes an operand of the rows' type where it is packed, and its gradients, those of the
// parameters in float; ada2i_fast/ops/linear.py says when.

// Tiles are faster than any cache but the first, so what a thread multiplies lies in its own: some rows of the batch by some elements of a row,
// the left operand, and panel after panel of the weight, each packed while the tiles multiply the one before. Panels deeper than kMostDepth
// would touch more pages than the processor has addresses of at hand. The sums wait, and go out as rows of some length: short pieces, far
// apart, take memory as long as the product takes. Vectors take a few panels at a time by all of a left operand that all threads share.
template <class E> constexpr int64_t kRowsTogether = kTiles<E> ? 512 : 2048;
template <class E> constexpr int kMostPanels = kTiles<E> ? 16 : 4;
constexpr int64_t kMostDepth = 256;
template <class E> INLINE int64_t elements_together(int64_t rows, int64_t k) {
  if (rows == 0 || k == 0) return kStripLength<E>;
  const int64_t most = smaller(kMostDepth, (int64_t(400) << 10) / (2 * Step<E>::parts * round_up(rows, kHeight<E>))), passes = (k + most - 1) / most;
  return round_up((k + passes - 1) / passes, kStripLength<E>);
}

// Beside<F>, and renew(strip, 0) to renew(strip, renewals - 1) for each strip that has served, in the slots of the one after it.
template <class F, class G> struct BesideRenewing : Beside<F> {
  G renew;
  int64_t renewals, strip_slots, free = 0, strip = 0, renewed = 0, renewing = 0;

  BesideRenewing(F piece, int64_t pieces, int64_t slots, G renew_, int64_t renewals_, int64_t strip_slots_)
      : Beside<F>{piece, pieces, slots}, renew(renew_), renewals(renewals_), strip_slots(strip_slots_) {}
  ALWAYS_INLINE void operator()() {
    Beside<F>::operator()();
    if (strip < free) next_renewal();
  }
  __attribute__((noinline)) void next_renewal() {
    for (renewing += renewals; renewing >= strip_slots; renewing -= strip_slots)
      if (renewed < renewals) renew(strip, renewed++);
    if (renewed == renewals) ++strip, renewed = 0;
  }
  void finish() {
    Beside<F>::finish();
    for (; strip < free; ++strip, renewed = 0)
      while (renewed < renewals) renew(strip, renewed++);
  }
  ALWAYS_INLINE void served(int64_t which) {
    if (renewals) free = which + 1;
  }
};

//   x weight more (null: none) | out
//
// transposed: out = x W^T + more for W [outputs, inputs] and more [outputs] in float, and with `relu` the relu_dropout of that. Else out =
// x W + more for x [rows, outputs] and out and more [rows, inputs], which may be one.
template <class S, bool transposed> struct LinearProduct {
  using E = Packed<S>;
  static constexpr int per = Step<E>::elements, lanes = Lanes<float>::count, columns = kColumns<float>;
  static constexpr int piece_rows = Step<E>::parts == 3 ? 4 : 16;   // of W, where it is packed as it stands, row by row
  const int64_t rows, k, n;
  const S* x;
  const float *weight, *bias;
  const S* added;
  S* out;
  const bool relu;
  const Mask mask;
  const int threads;
  const int64_t together, groups;                       // panels in a job, and jobs

  explicit LinearProduct(const Linear* args)
      : rows(args->rows), k(transposed ? args->inputs : args->outputs), n(transposed ? args->outputs : args->inputs), x((const S*)args->tensors[0]),
        weight((const float*)args->tensors[1]), bias(transposed ? (const float*)args->tensors[2] : nullptr),
        added(transposed ? nullptr : (const S*)args->tensors[2]), out((S*)args->tensors[3]), relu(transposed && args->relu), mask(args),
        threads(useful_threads(args->threads, args->rows * args->inputs * args->outputs)),
        together(group_size((n + columns - 1) / columns, threads, kMostPanels<E>)), groups(((n + columns - 1) / columns + together - 1) / together) {}

  // Sums of a row from `column` on, those before `end`.
  ALWAYS_INLINE void put(int64_t row, const float* c, int64_t column, int64_t end) const {
    static_assert(kWords == columns, "one draw serves the columns of a panel");
    const int64_t at = row * n + column;
    uint32_t words[kWords];
    if (relu && mask.used) philox(mask.seed, row, mask.stream, column, words);
    for (int64_t v = 0; v < smaller(columns, end - column); v += lanes) {
      const int64_t there = end - column - v;
      auto value = load(c + v);
      if (bias) value += load(bias + column + v, there);
      if (added) value += load(added + at + v, there);
      if (relu) {
        value = value < 0 ? Vector<float>{} : value;
        if (mask.used) value = keep(value, words + v, mask.threshold, mask.kept);
      }
      store(out + at + v, value, there);
    }
  }

  // The panel of the weight from `first` on, with `depth` elements from `start` on, in pieces.
  ALWAYS_INLINE static int64_t weight_pieces(int64_t depth) { return transposed ? transposed_pieces<E>(depth) : (depth + piece_rows - 1) / piece_rows; }
  ALWAYS_INLINE void pack_weight(E* to, int64_t start, int64_t depth, int64_t first, int64_t end, int64_t piece, Square<E>* square) const {
    const int64_t width = smaller(columns, end - first);
    if (transposed) {
      pack_transposed_piece(to, [&](int64_t r) __attribute__((always_inline)) { return weight + (first + r) * k + start; }, depth, width, 0, piece, square);
      return;
    }
    for (int64_t r = piece * piece_rows; r < smaller(depth, (piece + 1) * piece_rows); r += per) {
      const float* from = weight + (start + r) * n + first;
      pack_right(to, r, depth, width, from, r + 1 < depth ? from + n : nullptr, false);
    }
  }
  // Asks for what that piece reads: rows lie pages apart, and the processor does not see the next one coming.
  ALWAYS_INLINE void fetch_weight(int64_t start, int64_t first, int64_t piece) const {
    if (transposed) {
      constexpr int64_t turned = lanes * (Step<E>::parts == 3 ? 1 : per), share = (lanes + kSquarePieces<E> - 1) / kSquarePieces<E>;
      const int64_t square = piece / kSquarePieces<E>, from = piece % kSquarePieces<E> * share;
      const float* at = weight + (first + square % 2 * lanes) * k + start + square / 2 * turned;
      for (int64_t r = from; r < smaller(lanes, from + share); ++r)
        for (int64_t d = 0; d < turned; d += 16) __builtin_prefetch(at + r * k + d, 0, 2);
    } else {
      const float* at = weight + (start + piece * piece_rows) * n + first;
      for (int64_t r = 0; r < piece_rows; ++r)
        for (int64_t d = 0; d < columns; d += 16) __builtin_prefetch(at + r * n + d, 0, 2);
    }
  }

  int in_tiles() const {
    const int64_t most_rows = smaller(rows, kRowsTogether<E>), most_strips = (most_rows + kHeight<E> - 1) / kHeight<E>;
    const int64_t depth = elements_together<E>(most_rows, k), each = left_size<E>(depth), panel_size = right_size<E>(depth, columns);
    Scratch<E> left(most_strips * each, threads), right(2 * panel_size, threads);
    Scratch<float> waiting(sums_size(most_strips, together * columns), threads);
    if (!left.ok() || !right.ok() || !waiting.ok()) return 1;
#pragma omp parallel num_threads(threads)
    for (int64_t row = 0; row < rows; row += kRowsTogether<E>) {
      const int64_t there = smaller(kRowsTogether<E>, rows - row), strips = (there + kHeight<E> - 1) / kHeight<E>;
#pragma omp for schedule(dynamic)
      for (int64_t group = 0; group < groups; ++group) {
        const int thread = omp_get_thread_num();
        E *const rows_packed = left.of(thread), *const panel = right.of(thread);
        float* const sums = waiting.of(thread);
        const int64_t begin = group * together * columns, end = smaller(begin + together * columns, n);
        Square<E> square;
        auto deep = [&](int64_t start) __attribute__((always_inline)) { return smaller(depth, k - start); };
        auto pack_rows = [&](int64_t start, int64_t strip, int64_t piece) __attribute__((always_inline)) {
          const int64_t first = strip * kHeight<E>;
          pack_left_piece(rows_packed + strip * each, x + (row + first) * k + start, k, deep(start), smaller(kHeight<E>, there - first), piece);
        };
        struct Place { int64_t start, first; };             // of a panel
        auto after = [&](Place p) __attribute__((always_inline)) {
          return p.first + columns < end ? Place{p.start, p.first + columns} : Place{p.start + depth, begin};
        };

        for (int64_t strip = 0; strip < strips; ++strip)
          for (int64_t piece = 0; piece < left_pieces<E>(deep(0)); ++piece) pack_rows(0, strip, piece);
        for (int64_t piece = 0; piece < weight_pieces(deep(0)); ++piece) pack_weight(panel, 0, deep(0), begin, end, piece, &square);
        int64_t turn = 0;
        for (Place now = {0, begin}; now.start == 0 || now.start < k; now = after(now), ++turn) {
          const Place next = after(now), next_but_one = after(next);
          E *const own = panel + turn % 2 * panel_size, *const other = panel + (turn + 1) % 2 * panel_size;
          auto ahead = [&](int64_t piece) __attribute__((always_inline)) {
            pack_weight(other, next.start, deep(next.start), next.first, end, piece, &square);
            if (next_but_one.start < k) fetch_weight(next_but_one.start, next_but_one.first, piece);
          };
          auto renew = [&](int64_t strip, int64_t piece) __attribute__((always_inline)) { pack_rows(next.start, strip, piece); };
          constexpr int64_t fours = kFours<E, E>;
          const int64_t strip_slots = padded_steps<E>(deep(now.start)) / kStepBlock<E> * fours;
          const bool more = next.start < k, last = more && next.start > now.start;
          BesideRenewing<decltype(ahead), decltype(renew)> beside(
              ahead, more ? weight_pieces(deep(next.start)) : 0, strips * strip_slots,
              renew, last ? left_pieces<E>(deep(next.start)) : 0, smaller(strip_slots, kPart<E> / kStepBlock<E> * fours));
          multiply_strips(rows_packed, each, strips, own, deep(now.start), smaller(columns, end - now.first), sums + sums_size(strips, now.first - begin),
                          now.start > 0, beside);
          beside.finish();
        }
        for (int64_t r = 0; r < there; ++r)
          put_row(sums, strips, r, end - begin,
                  [&](int64_t, const float* c, int64_t column) __attribute__((always_inline)) { put(row + r, c, begin + column, end); });
      }
    }
    return 0;
  }

  int in_vectors() const {
    const int64_t most_strips = (smaller(rows, kRowsTogether<E>) + kHeight<E> - 1) / kHeight<E>, each = left_size<E>(k);
    Scratch<E> left(most_strips * each), right(right_size<E>(k, together * columns), threads);
    if (!left.ok() || !right.ok()) return 1;
#pragma omp parallel num_threads(threads)
    for (int64_t row = 0; row < rows; row += kRowsTogether<E>) {
      const int64_t there = smaller(kRowsTogether<E>, rows - row), strips = (there + kHeight<E> - 1) / kHeight<E>;
#pragma omp for schedule(static)
      for (int64_t strip = 0; strip < strips; ++strip)
        pack_left_rows(left.data + strip * each, x + (row + strip * kHeight<E>) * k, k, k, smaller(kHeight<E>, there - strip * kHeight<E>));
#pragma omp for schedule(dynamic)
      for (int64_t group = 0; group < groups; ++group) {
        E* const own = right.of(omp_get_thread_num());
        const int64_t begin = group * together * columns, end = smaller(begin + together * columns, n), width = end - begin;
        if (transposed) {
          for (int64_t column = 0; column < width; column += columns)
            pack_transposed(own, [&](int64_t r) { return weight + (begin + r) * k; }, k, width, column);
        } else {
          for (int64_t r = 0; r < k; r += per) {
            const float* from = weight + r * n + begin;
            for (int64_t ahead = 8; ahead < 8 + per && r + ahead < k; ++ahead)       // rows lie pages apart
              for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(from + ahead * n + d);
            pack_right(own, r, k, width, from, r + 1 < k ? from + n : nullptr, false);
          }
        }
        for (int64_t strip = 0; strip < strips; ++strip)
          multiply<Strips>(left.data + strip * each, own, k, width, [&](const float* c, int64_t column, int64_t, int64_t from, int64_t to) {
            for (int64_t i = from; i < smaller(to, there - strip * kHeight<E>); ++i) put(row + strip * kHeight<E> + i, c + i * columns, begin + column, end);
          });
      }
    }
    return 0;
  }

  int operator()() const {
    if constexpr (kTiles<E>) return in_tiles();
    else return in_vectors();
  }
};
template <class S> static int linear_forward(const Linear* args) { return LinearProduct<S, true>(args)(); }
template <class S> static int linear_input(const Linear* args) { return LinearProduct<S, false>(args)(); }

constexpr int64_t kDepth = 640;    // rows of the batch per pass, about: a strip and a panel of so many stay near the first-level cache

constexpr int64_t kLargeGradient = 1 << 18;   // numbers from which a weight's gradient, which the optimiser reads after many others, goes past the caches

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
  const int64_t strips = (m + kHeight<E> - 1) / kHeight<E>, together = group_size(strips, threads, kMostStrips<E>);
  const int64_t groups = (strips + together - 1) / together;
  const bool large = m * n >= kLargeGradient;
  const int64_t each = left_size<E>(depth);           // whole vectors are stored, so the last step of a strip writes past its end
  Scratch<E> right(right_size<E>(depth, n)), left(together * each, threads);
  Scratch<float> sums(kRowSums<E>, threads);
  if (!right.ok() || !left.ok() || !sums.ok()) return 1;
#pragma omp parallel num_threads(threads)
  for (int64_t start = 0; start == 0 || start < rows; start += depth) {
    const int64_t k = smaller(depth, rows - start);
    const bool past_caches = start + k >= rows && large && n % lanes == 0 && (uintptr_t)grad_weight % kBytes == 0;
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
        for (int64_t v = 0; v < smaller(columns, n - column); v += lanes) {
          const auto sum = start > 0 ? load(c + v) + load(to + v, n - column - v) : load(c + v);
          if (past_caches) stream(to + v, sum);
          else store(to + v, sum, n - column - v);
        }
      };
      multiply_rows(own, each, used, smaller(used * kHeight<E>, m - first), right.data, k, n, sums.of(omp_get_thread_num()), put);
      if (past_caches) streamed();
    }
  }
  return 0;
}
