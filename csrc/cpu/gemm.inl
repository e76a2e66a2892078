// The matrix product under every op: a register-blocked micro-kernel over packed operands (Goto and van de Geijn, 2008), with the
// left operand produced a few rows at a time by the op, and the right one packed once per call.
//
//   left   kRows rows. Strips of 64 bytes: strip s of row i lies at (s * kRows + i) * 64 bytes, so a row of x is copied by whole
//          vectors and the micro-kernel needs one pointer. For weight gradients, which multiply by a transpose, `Columns` holds
//          kRows consecutive numbers per step instead.
//   right  panels of kColumns columns, [steps][kColumns]; the last panel may be one vector wide.
//
// A step is one element of float or double, or two consecutive elements of bf16 where the tier has the bf16 dot product. There the
// operands are rounded to bf16 and the sum is float32; elsewhere bf16 and half are widened and multiplied in float32.

template <class S> struct OperandOf { typedef Compute<S> type; };
#if defined(__AVX512BF16__)
template <> struct OperandOf<bf16> { typedef bf16 type; };
#endif
template <class S> using Operand = typename OperandOf<S>::type;

template <class E> struct Step { typedef E type; static constexpr int elements = 1; };
template <> struct Step<bf16> { typedef uint32_t type; static constexpr int elements = 2; };

constexpr int kRows = kBytes == 64 ? 12 : 6;                                          // 24 of 32, or 12 of 16, registers accumulate
template <class T> constexpr int kColumns = 2 * Lanes<T>::count;

template <class E> INLINE int64_t steps(int64_t k) { return (k + Step<E>::elements - 1) / Step<E>::elements; }
template <class E> INLINE int64_t left_size(int64_t k) { return kRows * round_up(k, 64 / sizeof(E)) + 64; }   // see pack_columns
template <class E> INLINE int64_t right_size(int64_t k, int64_t n) {
  return steps<E>(k) * Step<E>::elements * round_up(n, kColumns<Compute<E>>);
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

// All columns of kRows rows; consume(c, column, columns) takes each tile while it is in the first-level cache.
template <class Layout, class E, class F>
INLINE void multiply(const E* left, const E* right, int64_t k, int64_t n, F consume) {
  using T = Compute<E>;
  using U = typename Step<E>::type;
  alignas(64) T c[kRows * kColumns<T>];
  const int64_t count = steps<E>(k);
  for (int64_t column = 0; column < n; column += kColumns<T>) {
    auto panel = (const U*)right + column * count;
    if (n - column > Lanes<T>::count) micro_kernel<Layout, 2>((const U*)left, panel, count, c);
    else micro_kernel<Layout, 1>((const U*)left, panel, count, c);
    consume(c, column, smaller(n - column, kColumns<T>));
  }
}

// ---- packing ------------------------------------------------------------------------------------------------------------------

// Row i of the left operand, k elements; load(column, n) gives a vector.
template <class E, class F> INLINE void pack_left(E* left, int i, int64_t k, F load_at) {
  using T = Compute<E>;
  constexpr int lanes = Lanes<T>::count, strip = 64 / sizeof(E);
  for (int64_t d = 0; d < round_up(k, Step<E>::elements); d += lanes)
    store(left + (d / strip * kRows + i) * strip + d % strip, load_at(d, smaller(lanes, k - d)));
}

// Rows first, first + 1, .. (one step) of the right operand from rows of n numbers that are zero up to a multiple of kColumns.
template <class T> INLINE void pack_right(T* right, int64_t first, int64_t k, int64_t n, const T* row, const T*) {
  for (int64_t column = 0; column < n; column += kColumns<T>)
    for (int v = 0; v < kColumns<T>; v += Lanes<T>::count)
      store(right + column * k + first * kColumns<T> + v, load(row + column + v));
}
#if defined(__AVX512BF16__)
INLINE void pack_right(bf16* right, int64_t first, int64_t k, int64_t n, const float* row, const float* next) {
  auto out = (uint32_t*)right;
  for (int64_t column = 0; column < n; column += kColumns<float>)
    for (int v = 0; v < kColumns<float>; v += Lanes<float>::count) {
      auto low = __builtin_convertvector(narrow(load(row + column + v), (const bf16*)0), Vector<uint32_t>);
      auto high = __builtin_convertvector(narrow(load(next + column + v), (const bf16*)0), Vector<uint32_t>);
      auto pair = low | (high << 16);
      __builtin_memcpy(out + column * steps<bf16>(k) + first / 2 * kColumns<float> + v, &pair, kBytes);
    }
}
#endif

template <class T> INLINE T to_compute(T value) { return value; }
INLINE float to_compute(bf16 value) { union { uint32_t u; float f; } bits = {uint32_t(value.bits) << 16}; return bits.f; }
INLINE float to_compute(half value) { return half_to_float(value); }

template <class E, class S> INLINE E convert(S value) { return to_compute(value); }
#if defined(__AVX512BF16__)
template <> inline __attribute__((always_inline)) bf16 convert<bf16, bf16>(bf16 value) { return value; }
#endif

// The panel of the right operand that starts at `column`, from a weight [n, k] that multiplies as its transpose.
template <class E, class S> static void pack_transposed(E* right, const S* weight, int64_t k, int64_t n, int64_t column) {
  constexpr int per = Step<E>::elements, columns = kColumns<Compute<E>>;
  const int64_t padded = steps<E>(k) * per;
  E* panel = right + column * padded;
  for (int c = 0; c < columns; ++c)
    for (int64_t d = 0; d < padded; ++d)
      panel[(d / per * columns + c) * per + d % per] =
          column + c < n && d < k ? convert<E>(weight[(column + c) * k + d]) : E{};
}

// One step of the right operand from a weight [k, n] as it stands; row0, row1: scratch of round_up(n, kColumns), zeros at the end.
template <class E, class S>
INLINE void pack_straight(E* right, const S* weight, int64_t k, int64_t n, int64_t first, Compute<S>* row0, Compute<S>* row1) {
  constexpr int lanes = Lanes<Compute<S>>::count;
  for (int64_t d = 0; d < n; d += lanes) store(row0 + d, load(weight + first * n + d, n - d));
  if (Step<E>::elements == 2)
    for (int64_t d = 0; d < n; d += lanes) store(row1 + d, first + 1 < k ? load(weight + (first + 1) * n + d, n - d) : Vector<Compute<S>>{});
  pack_right(right, first, k, n, row0, row1);
}

// ---- gradients of weights and biases ------------------------------------------------------------------------------------------

template <class E> INLINE Vector<Compute<E>> load_operand(const E* p, int64_t n) { return load(p, n); }
template <class E> INLINE Vector<Compute<E>> load_operand(const int8_t* p, int64_t n) { return load_signs<Compute<E>>(p, n); }

// One step of the left operand from kRows columns of the rows `row` and, for bf16, `next`; `height` of them exist. Whole vectors are
// stored, so the last step writes past its end, by less than a vector.
template <class T, class L> INLINE void pack_columns(T* left, const L* row, const L*, int64_t height) {
  for (int i = 0; i < kRows; i += Lanes<T>::count) store(left + i, load_operand<T>(row + i, i < height ? height - i : 0));
}
#if defined(__AVX512BF16__)
template <class L> INLINE void pack_columns(bf16* left, const L* row, const L* next, int64_t height) {
  auto widened = [](Vector<float> v) { return __builtin_convertvector(narrow(v, (const bf16*)0), Vector<uint32_t>); };
  auto pair = widened(load_operand<bf16>(row, height));
  if (next) pair |= widened(load_operand<bf16>(next, height)) << 16;
  __builtin_memcpy(left, &pair, kBytes);
}
#endif

constexpr int64_t kChunk = 512;   // rows of the batch per pass
constexpr int64_t kBlock = 16;    // rows packed by one job; a multiple of every step

// One gradient: weight [m, n] = scale left^T right and bias [m] = scale left^T 1, left being [rows, m]. The bias is one more column
// of the right operand, all ones.
template <class S, class L> struct WeightGradient {
  const L* left;
  int64_t m, n;
  S *weight, *bias;
  Compute<S> scale;
  Operand<S>* right;       // scratch, right_size(kChunk, n + 1)
  Compute<S>* total;       // scratch, [m][round_up(n + 1, kColumns)], used where there is more than one chunk
};

// Called by all threads of a parallel region. The rows are summed in their order, whatever the number of threads: threads divide the
// rows of the result. make_row(p, row, out) writes row `row` of the right operand of gradient p.
// left_scratch: left_size(kChunk) of E; row_scratch: two rows of round_up(n + 1, kColumns).
template <class S, class L, class F>
static void weight_gradients(WeightGradient<S, L>* gradients, int count, int64_t rows, Operand<S>* left_scratch,
                             Compute<S>* row_scratch, int64_t row_size, F make_row) {
  using E = Operand<S>;
  using T = Compute<S>;
  constexpr int per = Step<E>::elements, lanes = Lanes<T>::count;
  int64_t tiles = 0;
  for (int p = 0; p < count; ++p) tiles += (gradients[p].m + kRows - 1) / kRows;

  for (int64_t start = 0; start == 0 || start < rows; start += kChunk) {
    const int64_t k = smaller(kChunk, rows - start), blocks = (k + kBlock - 1) / kBlock;
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < count * blocks; ++job) {
      const int p = int(job / blocks);
      auto& g = gradients[p];
      const int64_t first = job % blocks * kBlock;
      for (int64_t r = first; r < smaller(first + kBlock, k); r += per) {
        for (int e = 0; e < per; ++e) {
          T* row = row_scratch + e * row_size;
          if (r + e < k) make_row(p, start + r + e, row);
          for (int64_t d = r + e < k ? g.n : 0; d < round_up(g.n + 1, lanes); ++d) row[d] = d == g.n && r + e < k;
        }
        pack_right(g.right, r, k, g.n + 1, row_scratch, row_scratch + row_size);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < tiles; ++job) {
      int p = 0;
      int64_t tile = job;
      for (int64_t own; tile >= (own = (gradients[p].m + kRows - 1) / kRows); ++p) tile -= own;
      auto& g = gradients[p];
      const int64_t d = tile * kRows, height = smaller(kRows, g.m - d), stride = round_up(g.n + 1, kColumns<T>);
      for (int64_t r = 0; r < k; r += per) {
        const L* row = g.left + (start + r) * g.m + d;
        pack_columns(left_scratch + r * kRows, row, r + 1 < k ? row + g.m : nullptr, height);
      }
      multiply<Columns>(left_scratch, g.right, k, g.n + 1, [&](T* c, int64_t column, int64_t columns) {
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
