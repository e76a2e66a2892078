// The matrix product under every op: a register-blocked micro-kernel over packed operands (Goto and van de Geijn, 2008), with the
// left operand produced a few rows at a time by the op, and the right one packed once per call.
//
//   left   kHeight rows. Strips of 64 bytes: strip s of row i lies at (s * kHeight + i) * 64 bytes, so a row of x is copied by whole
//          vectors and the micro-kernel needs one pointer. For weight gradients, which multiply by a transpose, `Columns` holds
//          kHeight consecutive numbers per step instead; not so in AMX tiles, whose left operand has one form.
//   right  panels of kColumns columns, [steps][kColumns]; the last panel may be one vector wide.
//
// A step is one element of float or double, or two consecutive elements of bf16 where the tier has the bf16 dot product. There the
// operands are rounded to bf16 and the sum is float32; elsewhere bf16 and half are widened and multiplied in float32. AMX takes 16 steps
// at once: operands are filled up with zeros to a whole number of those.

template <class S> struct OperandOf { typedef Compute<S> type; };
#if defined(__AVX512BF16__)
template <> struct OperandOf<bf16> { typedef bf16 type; };
#endif
template <class S> using Operand = typename OperandOf<S>::type;

template <class E> struct Step { typedef E type; static constexpr int elements = 1; static constexpr E one = 1; };
template <> struct Step<bf16> { typedef uint32_t type; static constexpr int elements = 2; static constexpr type one = 0x3f803f80; };

constexpr int kRows = kBytes == 64 ? 12 : 6;                                          // 24 of 32, or 12 of 16, registers accumulate
template <class E> constexpr int kHeight = kRows;                                     // rows of the left operand
template <class E> constexpr int kStepBlock = 1;                                      // steps come in multiples of it
#if defined(__AMX_BF16__)
template <> constexpr int kHeight<bf16> = 32;                                         // 2 x 2 tiles of 16 x 16 accumulate
template <> constexpr int kStepBlock<bf16> = 16;
#endif
template <class T> constexpr int kColumns = 2 * Lanes<T>::count;

template <class E> INLINE int64_t steps(int64_t k) { return (k + Step<E>::elements - 1) / Step<E>::elements; }
template <class E> INLINE int64_t padded_steps(int64_t k) { return round_up(steps<E>(k), kStepBlock<E>); }
template <class E> constexpr int64_t left_size(int64_t k) {                           // see pack_left_columns for what comes on top
  return kHeight<E> * ((k * int64_t(sizeof(E)) + 63) / 64 * 64 / int64_t(sizeof(E))) + 64;
}
template <class E> INLINE int64_t right_size(int64_t k, int64_t n) {
  return padded_steps<E>(k) * Step<E>::elements * round_up(n, kColumns<Compute<E>>);
}

// ---- micro-kernel -------------------------------------------------------------------------------------------------------------

template <class T> INLINE Vector<T> multiply_add(Vector<T> total, T a, Vector<T> b) { return total + a * b; }
#if defined(__AVX512BF16__)
INLINE Vector<float> multiply_add(Vector<float> total, uint32_t a, Vector<uint32_t> b) {
  return (Vector<float>)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
}
#endif

// Where step k of row i lies within a strip.
struct Strips { static constexpr int at(int i, int k, int strip) { return i * strip + k; } };
struct Columns { static constexpr int at(int i, int k, int) { return k * kRows + i; } };

// c[kRows][kColumns] = left * panel, over `count` steps.
template <class Layout, int width, class U, class T>
static __attribute__((noinline)) void micro_kernel(const U* left, const U* panel, int64_t count, T* c) {
  constexpr int lanes = Lanes<T>::count, strip = 64 / sizeof(U);
  Vector<T> total[kRows][width] = {};
  auto step = [&](int k) __attribute__((always_inline)) {
    Vector<U> b[width];
    for (int v = 0; v < width; ++v) __builtin_memcpy(&b[v], panel + v * lanes, kBytes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < width; ++v)
        total[i][v] = multiply_add(total[i][v], left[Layout::at(i, k, strip)], b[v]);
    panel += kColumns<T>;
  };
  for (; count >= strip; count -= strip, left += kRows * strip)
    for (int k = 0; k < strip; ++k) step(k);
  for (int k = 0; k < count; ++k) step(k);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < width; ++v) __builtin_memcpy(c + i * kColumns<T> + v * lanes, &total[i][v], kBytes);
}

template <class E> struct Engine { Engine() {} };                                     // what has to be set up before a micro-kernel
#if defined(__AMX_BF16__)
// The shapes of the tiles, all of 16 rows of 64 bytes, for as long as it lives: 0 to 3 accumulate, 4 and 5 are left, 6 and 7 right.
struct Tiles {
  Tiles() {
    alignas(64) uint8_t config[64] = {1};                                             // palette 1; then bytes per row and rows of each
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

// c (+)= left * panel
template <int width, bool add> static __attribute__((noinline)) void tile_kernel(const uint32_t* left, const uint32_t* panel, int64_t count, float* c) {
  constexpr int columns = kColumns<float>;
  if (add) {
    _tile_loadd(0, c, 4 * columns);
    _tile_loadd(1, c + 16, 4 * columns);
    _tile_loadd(2, c + 16 * columns, 4 * columns);
    _tile_loadd(3, c + 16 * columns + 16, 4 * columns);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (; count > 0; count -= 16, left += 32 * 16, panel += 16 * columns) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, panel, 4 * columns);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, left + 16 * 16, 64);
    _tile_dpbf16ps(2, 5, 6);
    if (width == 1) continue;
    _tile_loadd(7, panel + 16, 4 * columns);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 4 * columns);
  _tile_stored(1, c + 16, 4 * columns);
  _tile_stored(2, c + 16 * columns, 4 * columns);
  _tile_stored(3, c + 16 * columns + 16, 4 * columns);
}
template <class Layout, int width> INLINE void micro_kernel(const uint32_t* left, const uint32_t* panel, int64_t count, float* c) {
  tile_kernel<width, false>(left, panel, count, c);
}
template <> struct Engine<bf16> : Tiles {};
#endif

// At most so many steps are summed in a row, longer sums in parts: rounding errors grow with the length of a sum.
constexpr int64_t kMostSteps = 512;

// All columns of kHeight rows; consume(c, column, columns) takes each tile while it is in the first-level cache.
template <class Layout, class E, class F>
INLINE void multiply(const E* left, const E* right, int64_t k, int64_t n, F consume) {
  using T = Compute<E>;
  using U = typename Step<E>::type;
  constexpr int size = kHeight<E> * kColumns<T>;
  alignas(64) T c[size], part[size];
  const int64_t count = padded_steps<E>(k);
  const Engine<E> engine;
  for (int64_t column = 0; column < n; column += kColumns<T>) {
    auto panel = (const U*)right + column * count;
    const bool wide = n - column > Lanes<T>::count;
    for (int64_t start = 0; start == 0 || start < count; start += kMostSteps) {
      T* to = start ? part : c;
      const int64_t steps_here = smaller(kMostSteps, count - start);
      const U *from = (const U*)left + start * kHeight<E>, *times = panel + start * kColumns<T>;
      if (wide) micro_kernel<Layout, 2>(from, times, steps_here, to);
      else micro_kernel<Layout, 1>(from, times, steps_here, to);
      if (start)
        for (int i = 0; i < size; i += Lanes<T>::count) store(c + i, load(c + i) + load(part + i));
    }
    consume(c, column, smaller(n - column, kColumns<T>));
  }
}

constexpr int kTogether = 16;       // left operands that multiply_all takes together
template <class E> INLINE int64_t sums_size(int64_t n) { return kStepBlock<E> > 1 ? kTogether * kHeight<E> * round_up(n, kColumns<Compute<E>>) : 0; }

// The same for `strips` left operands, `each` apart; consume(strip, c, column, columns). sums: scratch of sums_size(n).
template <class E, class F>
INLINE void multiply_all(const E* left, int64_t each, int64_t strips, const E* right, int64_t k, int64_t n, Compute<E>* sums, F consume) {
#if defined(__AMX_BF16__)
  // Tiles are faster than the second-level cache: a part of the depth at a time, of which a panel stays in the first and the left operands
  // in the second.
  if constexpr (kStepBlock<E> > 1) {
    constexpr int64_t part = 128, size = kHeight<E> * kColumns<float>;
    typedef void Kernel(const uint32_t*, const uint32_t*, int64_t, float*);
    static Kernel* const kernels[2][2] = {{tile_kernel<1, false>, tile_kernel<1, true>}, {tile_kernel<2, false>, tile_kernel<2, true>}};
    const int64_t count = padded_steps<E>(k);
    const Engine<E> engine;
    for (int64_t first = 0; first < strips; first += kTogether) {
      const int64_t here = smaller(kTogether, strips - first);
      auto sum = [&](int64_t strip, int64_t column) { return sums + (column / kColumns<float> * kTogether + strip) * size; };
      for (int64_t start = 0; start == 0 || start < count; start += part)
        for (int64_t column = 0; column < n; column += kColumns<float>)
          for (int64_t strip = 0; strip < here; ++strip)
            kernels[n - column > Lanes<float>::count][start > 0](
                (const uint32_t*)(left + (first + strip) * each) + start * kHeight<E>, (const uint32_t*)right + column * count + start * kColumns<float>,
                smaller(part, count - start), sum(strip, column));
      for (int64_t column = 0; column < n; column += kColumns<float>)
        for (int64_t strip = 0; strip < here; ++strip) consume(first + strip, sum(strip, column), column, smaller(n - column, kColumns<float>));
    }
    return;
  }
#endif
  for (int64_t strip = 0; strip < strips; ++strip)
    multiply<Strips>(left + strip * each, right, k, n, [&](auto* c, int64_t column, int64_t columns) { consume(strip, c, column, columns); });
}

// ---- packing ------------------------------------------------------------------------------------------------------------------

// Row i of the left operand, k elements; load(column, n) gives a vector.
template <class E, class F> INLINE void pack_left(E* left, int i, int64_t k, F load_at) {
  using T = Compute<E>;
  constexpr int lanes = Lanes<T>::count, strip = 64 / sizeof(E);
  for (int64_t d = 0; d < padded_steps<E>(k) * Step<E>::elements; d += lanes)
    store(left + (d / strip * kHeight<E> + i) * strip + d % strip, d < k ? load_at(d, smaller(lanes, k - d)) : Vector<T>{});
}

// kHeight rows of the left operand from rows of k numbers as they stand; those past `height` are zero.
template <class E, class S> INLINE void pack_left_rows(E* left, const S* rows, int64_t k, int64_t height) {
  for (int i = 0; i < kHeight<E>; ++i)
    pack_left(left, i, k, [&](int64_t d, int64_t n) { return i < height ? load(rows + i * k + d, n) : Vector<Compute<S>>{}; });
}

template <class T, class L> INLINE Vector<T> load_as(const L* p, int64_t n) { return load(p, n); }
template <class T> INLINE Vector<T> load_as(const int8_t* p, int64_t n) { return load_signs<T>(p, n); }

// A step of the columns at p, of which n exist; bf16 takes two rows, and zeros where `next` is null.
template <class T, class L> INLINE Vector<T> row_step(T*, const L* row, const L*, int64_t n) { return load_as<T>(row, n); }
// The steps from p on of a row of which n numbers are left.
template <class T, class S> INLINE Vector<T> steps_at(T*, const S* p, int64_t n) { return load(p, n); }
#if defined(__AVX512BF16__)
INLINE void pack_left_rows(bf16* left, const bf16* rows, int64_t k, int64_t height) {
  constexpr int64_t strip = 32;
  for (int i = 0; i < kHeight<bf16>; ++i)
    for (int64_t d = 0; d < k; d += strip) {
      const int64_t n = i < height ? smaller(strip, k - d) : 0;
      _mm512_storeu_si512(left + d * kHeight<bf16> + i * strip, _mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : ~0u, rows + i * k + d));
    }
}

// 16 operands of bf16. The conversion takes subnormals for 0, as the dot product does.
INLINE __m256i bf16_operands(const bf16* p, int64_t n) { return (__m256i)masked(p, n < 16 ? (1u << n) - 1 : ~0u); }
// Lane i holds the operands i of two rows.
INLINE Vector<uint32_t> interleave_rows(__m512i rows) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Vector<uint32_t>)_mm512_permutexvar_epi16(_mm512_load_si512(order), rows);
}
INLINE Vector<uint32_t> row_step(uint32_t*, const bf16* row, const bf16* next, int64_t n) {
  const __m256i second = next ? bf16_operands(next, n) : __m256i{};
  return interleave_rows(_mm512_inserti64x4(_mm512_castsi256_si512(bf16_operands(row, n)), second, 1));
}
template <class L> INLINE Vector<uint32_t> row_step(uint32_t*, const L* row, const L* next, int64_t n) {
  const auto second = next ? load_as<float>(next, n) : Vector<float>{};
  return interleave_rows((__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)load_as<float>(row, n)));
}
INLINE Vector<uint32_t> steps_at(uint32_t*, const float* p, int64_t n) {
  return (Vector<uint32_t>)_mm512_cvtne2ps_pbh((__m512)load(p + 16, n > 16 ? n - 16 : 0), (__m512)load(p, n));
}
INLINE Vector<uint32_t> steps_at(uint32_t*, const bf16* p, int64_t n) {
  return (Vector<uint32_t>)_mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : ~0u, p);
}
#endif

// Step number r / elements of the right operand from row r of n numbers (and, for bf16, the next one) as they stand; the last one fills up
// with zeros. With `one`, a column of ones follows them.
template <class E, class R> INLINE void pack_right(E* right, int64_t r, int64_t k, int64_t n, const R* row, const R* next, bool one) {
  using U = typename Step<E>::type;
  constexpr int lanes = Lanes<U>::count;
  constexpr int64_t columns = kColumns<Compute<E>>;
  const int64_t count = padded_steps<E>(k), place = r / Step<E>::elements;
  for (int64_t d = 0; d < n + one; d += lanes) {
    U* panel = (U*)right + d / columns * columns * count + d % columns;
    auto step = row_step((U*)0, row + d, next ? next + d : nullptr, n - d);
    if (one && n - d < lanes) step[n - d] = Step<E>::one;
    __builtin_memcpy(panel + place * columns, &step, kBytes);
    if (kStepBlock<E> > 1 && r + Step<E>::elements >= k)
      for (int64_t filler = place + 1; filler < count; ++filler) __builtin_memset(panel + filler * columns, 0, kBytes);
  }
}

// The same from row r of a weight [k, n].
template <class E, class S> INLINE void pack_weight_rows(E* right, const S* weight, int64_t k, int64_t n, int64_t r) {
  pack_right(right, r, k, n, weight + r * n, r + 1 < k ? weight + (r + 1) * n : nullptr, false);
}

// The panel of the right operand that starts at `column`, from a weight [n, k] that multiplies as its transpose; row(i) is its row i.
template <class E, class F> static void pack_transposed(E* right, F row, int64_t k, int64_t n, int64_t column) {
  using U = typename Step<E>::type;
  constexpr int lanes = Lanes<U>::count, columns = kColumns<Compute<E>>, per = Step<E>::elements;
  const int64_t count = padded_steps<E>(k);
  U* panel = (U*)right + column * count;
  for (int64_t c = 0; c < smaller(columns, n - column); c += lanes)
    for (int64_t step = 0; step < count; step += lanes) {
      Vector<U> square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
        square[i] = column + c + i < n ? steps_at((U*)0, row(column + c + i) + step * per, k - step * per) : Vector<U>{};
      transpose_square<U>(square);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
        if (step + i < count) __builtin_memcpy(panel + (step + i) * columns + c, &square[i], kBytes);
    }
}

// ---- gradients of weights and biases ------------------------------------------------------------------------------------------

constexpr int64_t kChunk = 512;   // rows of the batch per pass
constexpr int64_t kBlock = 16;    // rows packed by one job; a multiple of every step

// Strips of kHeight columns that one job packs side by side: a row's share is a cache line or a few.
template <class E> constexpr int kGroup = kHeight<E> < 24 ? 48 / kHeight<E> : 2;

// One gradient: weight [m, n] = scale left^T right and bias [m] = scale left^T 1, left being [rows, m]. The bias is one more column
// of the right operand, all ones.
template <class S, class P = S> struct WeightGradient {
  const Operand<S>* left;  // of this pass alone; or, where it is null,
  const int8_t* signs;     // of all rows
  const S* rows;           // the right operand [rows, n], or null where make_row makes it
  int64_t m, n;
  P *weight, *bias;
  Compute<S> scale;
  Operand<S>* right;       // scratch, right_size(kChunk, n + 1)
  bool packed;             // an earlier gradient has the same right operand, and the same scratch
  Compute<S>* total;       // scratch, [m][round_up(n + 1, kColumns)], used where there is more than one chunk
};

// Scratch per thread of weight_gradients. Whole vectors are stored, so the last step of a strip writes past its end.
template <class E> constexpr int64_t kStrip = left_size<E>(kChunk);
template <class E> constexpr int64_t kStrips = kGroup<E> * kStrip<E>;

// `count` steps of `strips` left operands, kHeight columns each, from the transpose of k rows of m numbers, of which `there` are left from
// `left` on; strip s begins at to + s * each. see(s, i, step) gets the step of columns i to i + lanes of strip s.
template <class E, class L, class F>
INLINE void pack_left_columns(E* to, int64_t each, const L* left, int64_t m, int64_t there, int64_t k, int64_t strips, F see) {
  using U = typename Step<E>::type;
  constexpr int per = Step<E>::elements, lanes = Lanes<U>::count, height = kHeight<E>;
  auto step_at = [&](int64_t r, int64_t column) __attribute__((always_inline)) {
    const L* row = left + r * m + column;
    return row_step((U*)0, row, r + 1 < k ? row + m : nullptr, there > column ? there - column : 0);
  };
  if constexpr (kStepBlock<E> == 1) {
    for (int64_t r = 0; r < k; r += per)
      for (int64_t s = 0; s < strips; ++s)
        for (int i = 0; i < height; i += lanes) {
          const auto step = step_at(r, s * height + i);
          __builtin_memcpy((U*)(to + s * each) + r / per * height + i, &step, kBytes);
          see(s, i, step);
        }
  } else {                                                    // a strip's rows are columns here: squares of vectors change sides
    for (int64_t r = 0; r < k; r += per * lanes)
      for (int64_t s = 0; s < strips; ++s)
        for (int i = 0; i < height; i += lanes) {
          Vector<U> square[lanes];
#pragma GCC unroll 16
          for (int step = 0; step < lanes; ++step) {
            square[step] = r + per * step < k ? step_at(r + per * step, s * height + i) : Vector<U>{};
            see(s, i, square[step]);
          }
          transpose_square<U>(square);
          U* out = (U*)(to + s * each) + (r / (per * lanes) * height + i) * lanes;
#pragma GCC unroll 16
          for (int row = 0; row < lanes; ++row) __builtin_memcpy(out + row * lanes, &square[row], kBytes);
        }
  }
}

// One pass: adds kChunk rows from `start` on, or those that are left. Called by all threads of a parallel region, pass after pass, and once
// where there are no rows. The rows are summed in their order, whatever the number of threads: threads divide the rows of the result.
// make_row(p, row, out) writes row `row` of the right operand of gradient p. strips: kStrips of E; row_scratch: two rows of n numbers,
// and a vector.
template <class S, class P, class F>
static void weight_gradients(WeightGradient<S, P>* gradients, int count, int64_t start, int64_t rows, Operand<S>* strips,
                             Compute<S>* row_scratch, int64_t row_size, F make_row) {
  using E = Operand<S>;
  using T = Compute<S>;
  using U = typename Step<E>::type;
  constexpr int per = Step<E>::elements, lanes = Lanes<T>::count, group = kGroup<E> * kHeight<E>;
  int64_t groups = 0;
  for (int p = 0; p < count; ++p) groups += (gradients[p].m + group - 1) / group;

  const int64_t k = smaller(kChunk, rows - start), blocks = (k + kBlock - 1) / kBlock;
#pragma omp for schedule(dynamic)
  for (int64_t job = 0; job < count * blocks; ++job) {
    const int p = int(job / blocks);
    const WeightGradient<S, P> g = gradients[p];     // a copy: stores might change the original, for all the compiler knows
    if (g.packed) continue;
    for (int64_t r = job % blocks * kBlock; r < smaller((job % blocks + 1) * kBlock, k); r += per) {
      const bool both = per == 2 && r + 1 < k;
      if (g.rows) {
        const S* row = g.rows + (start + r) * g.n;
        pack_right(g.right, r, k, g.n, row, both ? row + g.n : nullptr, true);
      } else {
        make_row(p, start + r, row_scratch);
        if (both) make_row(p, start + r + 1, row_scratch + row_size);
        pack_right(g.right, r, k, g.n, (const T*)row_scratch, both ? (const T*)row_scratch + row_size : nullptr, true);
      }
    }
  }
#pragma omp for schedule(dynamic)
  for (int64_t job = 0; job < groups; ++job) {
    int p = 0;
    int64_t place = job;
    for (int64_t own; place >= (own = (gradients[p].m + group - 1) / group); ++p) place -= own;
    const WeightGradient<S, P> g = gradients[p];
    const int64_t first = place * group, stride = round_up(g.n + 1, kColumns<T>);
    const int used = int((smaller(group, g.m - first) + kHeight<E> - 1) / kHeight<E>);
    auto pack = [&](auto* left) __attribute__((always_inline)) {
      pack_left_columns(strips, kStrip<E>, left + first, g.m, g.m - first, k, used, [](int64_t, int, Vector<U>) {});
    };
    if (g.left) pack(g.left);
    else pack(g.signs + start * g.m);
    for (int s = 0; s < used; ++s) {
      const int64_t d = first + s * kHeight<E>, height = smaller(kHeight<E>, g.m - d);
      multiply<Columns>(strips + s * kStrip<E>, g.right, k, g.n + 1, [&](T* c, int64_t column, int64_t columns) {
        const bool last = start + k == rows;
        for (int i = 0; i < height; ++i)
          for (int64_t v = 0; v < columns; v += lanes) {
            T* total = g.total + (d + i) * stride + column + v;
            auto value = load(c + i * kColumns<T> + v);
            if (start > 0) value += load(total);
            if (!last) {
              store(total, value);
              continue;
            }
            value *= g.scale;
            const int64_t left_of_bias = g.n - column - v;
            store(g.weight + (d + i) * g.n + column + v, value, smaller(left_of_bias, lanes));
            if (left_of_bias < lanes) {
              T part[lanes];
              store(part, value);
              store(g.bias + d + i, broadcast<T>(part[left_of_bias]), 1);
            }
          }
      });
    }
  }
}
