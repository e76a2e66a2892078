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
//
// AMX multiplies floats too, as bf16x3: x = x0 + x1 + x2 holds the 24 bits of a float, x0 being x rounded to bf16 (halves up), x1 and x2 the
// upper and the lower bits of the rest. Of the nine products of two such sums the three smallest, on average some 2^-26 of the whole,
// are left out (Henry, Tang and Heinecke, 2019). Six products in tiles
// take less time than one in vectors. As everywhere in AMX subnormal numbers count as 0, those of x1 and x2 too; infinities, and numbers
// that round to one in bf16 (above 3.39e38), give NaN. The parts of 16 steps lie one after the other.

#if defined(__AMX_BF16__)
struct bf16x3 { bf16 part[3]; };
#endif
// Operand: what numbers of type S are multiplied as. Packed: the type of packed operands.
template <class S> struct OperandOf { typedef Compute<S> type; };
#if defined(__AVX512BF16__)
template <> struct OperandOf<bf16> { typedef bf16 type; };
#endif
template <class S> using Operand = typename OperandOf<S>::type;
template <class E> struct PackedOf { typedef E type; };
#if defined(__AMX_BF16__)
template <> struct PackedOf<float> { typedef bf16x3 type; };
#endif
template <class S> using Packed = typename PackedOf<Operand<S>>::type;
// What a left operand of -1, 0 and 1 is packed as, to be multiplied by Packed<S>: of bf16x3 one part says all.
template <class E> struct SignsOf { typedef E type; };
#if defined(__AMX_BF16__)
template <> struct SignsOf<bf16x3> { typedef bf16 type; };
#endif
template <class S> using PackedSigns = typename SignsOf<Packed<S>>::type;

// What a step is made of: words, one for each part.
template <class E> struct Step { typedef E word; static constexpr int elements = 1, parts = 1; static constexpr E one = 1; };
template <> struct Step<bf16> { typedef uint32_t word; static constexpr int elements = 2, parts = 1; static constexpr word one = 0x3f803f80; };
#if defined(__AMX_BF16__)
template <> struct Step<bf16x3> : Step<bf16> { static constexpr int parts = 3; };     // one: of the first part
#endif
template <class E> using Word = typename Step<E>::word;
template <class E> struct Steps { Vector<Word<E>> part[Step<E>::parts]; };            // a step of each column, or steps in a row

constexpr int kRows = kBytes == 64 ? 12 : 6;                                          // 24 of 32, or 12 of 16, registers accumulate
template <class E> constexpr int kHeight = kRows;                                     // rows of the left operand
template <class E> constexpr int kStepBlock = 1;                                      // steps come in multiples of it
#if defined(__AMX_BF16__)
template <> constexpr int kHeight<bf16> = 32;                                         // 2 x 2 tiles of 16 x 16 accumulate
template <> constexpr int kHeight<bf16x3> = 32;
template <> constexpr int kStepBlock<bf16> = 16;
template <> constexpr int kStepBlock<bf16x3> = 16;
#endif
template <class E> constexpr bool kTiles = (kStepBlock<E> > 1);
template <class T> constexpr int kColumns = 2 * Lanes<T>::count;
template <class E> constexpr int kStripLength = 64 / sizeof(Word<E>) * Step<E>::elements;

template <class E> INLINE int64_t steps(int64_t k) { return (k + Step<E>::elements - 1) / Step<E>::elements; }
template <class E> INLINE int64_t padded_steps(int64_t k) { return round_up(steps<E>(k), kStepBlock<E>); }
template <class E> constexpr int64_t left_size(int64_t k) {                           // see pack_left_columns for what comes on top
  return kHeight<E> * ((k + kStripLength<E> - 1) / kStripLength<E> * kStripLength<E>) + 64;
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

// Asks for `count` numbers that will soon be needed, into the cache of that level: while a product goes on, the processor itself does not look that
// far ahead.
template <int level = 2, class S> INLINE void ask(const S* p, int64_t count) {
  for (int64_t at = 0; at < count; at += 64 / int64_t(sizeof(S))) __builtin_prefetch(p + at, 0, 4 - level);
}

// Where step k of row i lies within a strip.
struct Strips { static constexpr int at(int i, int k, int strip) { return i * strip + k; } };
struct Columns { static constexpr int at(int i, int k, int) { return k * kRows + i; } };

// c[kRows][kColumns] = left * panel, over `count` steps.
template <class Layout, int width, class U, class T>
static __attribute__((noinline)) void vector_kernel(const U* left, const U* panel, int64_t count, T* c) {
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

// Work beside tiles: a multiplication of tiles takes 16 cycles, in which the processor does something else for nothing, as long as there is no
// more of it than some hundred instructions between four multiplications; then it no longer sees the next ones coming. `beside` of what
// follows is an object, with beside() for each four multiplications, and served(strip) for each strip of a panel that is done.
struct Nothing {
  ALWAYS_INLINE void operator()() {}
  ALWAYS_INLINE void served(int64_t) {}
};
// Such an object: piece(0) to piece(pieces - 1), evenly in so many slots, which are calls.
template <class F> struct Beside {
  F piece;
  int64_t pieces, slots, done = 0, credit = 0;

  ALWAYS_INLINE void operator()() {
    credit += pieces;
    if (credit >= slots) next();
  }
  __attribute__((noinline)) void next() {
    for (; credit >= slots; credit -= slots)
      if (done < pieces) piece(done++);
  }
  void finish() {
    while (done < pieces) piece(done++);
  }
  ALWAYS_INLINE void served(int64_t) {}
};
// Its pieces, where they are those of rows of D numbers: piece(i, d) for `columns` of row i from d on, row by row.
template <class F> struct RowByRow {
  F piece;
  int64_t D, columns, i = 0, d = 0;

  int64_t pieces(int64_t rows) const { return rows * ((D + columns - 1) / columns); }
  ALWAYS_INLINE void operator()(int64_t) {
    piece(i, d);
    d += columns;
    if (d >= D) d = 0, ++i;
  }
};
template <class L, class E> constexpr int kFours = Step<L>::parts == 3 ? 6 : Step<E>::parts;   // in kStepBlock steps
template <class L, class E> constexpr bool kBesideTiles = kTiles<E> && kFours<L, E> > 1;       // bf16 leaves tiles too little time
constexpr int64_t kTile = 32 * 32;
template <class E> constexpr int64_t kPart = Step<E>::parts == 3 ? 64 : 128;               // steps whose panel stays in the first-level cache

template <class E> struct Engine { Engine() {} };                                     // what has to be set up before a micro-kernel
#if defined(__AMX_BF16__)
// The shapes of the tiles, all of 16 rows of 64 bytes, for as long as it lives: 0 to 3 accumulate, 4 and 5 are left, 6 and 7 right.
struct Tiles {
  Tiles() {
    alignas(64) uint8_t config[64] = {1};                                             // palette 1; then bytes per row and rows of each
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    asm volatile("" : : "r"(config) : "memory");                                      // GCC 12 knows of the first 8 bytes alone that they are read
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

// c (+)= left * panel. Meanwhile the lines from `coming` on are asked for, so many with each four multiplications, no more than `most` of them.
template <class L, class E, int width, bool add, int lines, class F>
static __attribute__((noinline)) void tile_kernel(const L* left, const E* panel, int64_t count, float* c, const void* coming, int64_t most, F& beside) {
  constexpr int columns = kColumns<float>, part = 32 * 16;                            // words of a part, left and right
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
  auto l = (const uint32_t*)left, r = (const uint32_t*)panel;
  auto take = [&](int left_part, int right_part) __attribute__((always_inline)) {
    _tile_loadd(4, l + left_part * part, 64);
    _tile_loadd(6, r + right_part * part, 4 * columns);
    _tile_loadd(5, l + left_part * part + part / 2, 64);
    if (width == 2) _tile_loadd(7, r + right_part * part + 16, 4 * columns);
  };
  // Multiply what is there. The tiles of another part follow as soon as theirs have served.
  auto then_left = [&](int which) __attribute__((always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    if (width == 2) _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(4, l + which * part, 64);
    _tile_dpbf16ps(2, 5, 6);
    if (width == 2) _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(5, l + which * part + part / 2, 64);
  };
  auto then_right = [&](int which) __attribute__((always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(6, r + which * part, 4 * columns);
    if (width == 1) return;
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(7, r + which * part + 16, 4 * columns);
  };
  auto next = (const char*)coming;
  const char* const end = next + most * 64;
  auto meanwhile = [&]() __attribute__((always_inline)) {
    if (next < end) {
#pragma GCC unroll 32
      for (int i = 0; i < lines; ++i) __builtin_prefetch(next + i * 64);
      next += lines * 64;
    }
    beside();
  };
  for (; count > 0; count -= 16, l += Step<L>::parts * part, r += Step<E>::parts * part) {
    if (Step<L>::parts == 3) {
      take(2, 0), meanwhile();
      then_left(1), meanwhile();
      then_right(1), meanwhile();
      then_left(0), meanwhile();
      then_right(2), meanwhile();
      then_right(0), meanwhile();
    } else if (Step<E>::parts == 3) {
      take(0, 2), meanwhile();
      then_right(1), meanwhile();
      then_right(0), meanwhile();
    } else {
      take(0, 0), meanwhile();
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (width == 1) continue;
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 4 * columns);
  _tile_stored(1, c + 16, 4 * columns);
  _tile_stored(2, c + 16 * columns, 4 * columns);
  _tile_stored(3, c + 16 * columns + 16, 4 * columns);
}
template <> struct Engine<bf16> : Tiles {};
template <> struct Engine<bf16x3> : Tiles {};
#endif

// c = left * panel, of which `columns` exist, over `count` steps. At most kMostSteps are summed in a row, longer sums in parts: rounding
// errors grow with the length of a sum.
constexpr int64_t kMostSteps = 512;

template <class Layout, class L, class E, class F>
INLINE void micro_kernel(const L* left, const E* panel, int64_t count, int64_t columns, Compute<E>* c, F& beside) {
  using T = Compute<E>;
  constexpr int size = kHeight<E> * kColumns<T>, per = Step<E>::elements;
  alignas(64) T part[size];
  for (int64_t start = 0; start == 0 || start < count; start += kMostSteps) {
    T* to = start ? part : c;
    const int64_t here = smaller(kMostSteps, count - start);
    const L* from = left + start * kHeight<E> * per;
    const E* times = panel + start * kColumns<T> * per;
    const bool wide = columns > Lanes<T>::count;
#if defined(__AMX_BF16__)
    if constexpr (kTiles<E>) {
      // The panel, which another thread may have packed, is asked for a block of steps ahead.
      constexpr int64_t block = kStepBlock<E> * kColumns<T> * per, lines = block * sizeof(E) / 64, each = lines / kFours<L, E>;
      const int64_t most = here / kStepBlock<E> * lines;
      wide ? tile_kernel<L, E, 2, false, each>(from, times, here, to, times + block, most, beside)
           : tile_kernel<L, E, 1, false, each>(from, times, here, to, times + block, most, beside);
    } else
#endif
    if (wide) vector_kernel<Layout, 2>((const Word<E>*)from, (const Word<E>*)times, here, to);
    else vector_kernel<Layout, 1>((const Word<E>*)from, (const Word<E>*)times, here, to);
    if (start)
      for (int i = 0; i < size; i += Lanes<T>::count) store(c + i, load(c + i) + load(part + i));
  }
}

// All columns of kHeight rows; consume(c, column, columns, first, last) takes the rows from `first` on of a tile while it is in the first-level
// cache: all at once, or beside the tiles of the next panel, row by row.
template <class Layout, class L, class E, class F>
INLINE void multiply(const L* left, const E* right, int64_t k, int64_t n, F consume) {
  using T = Compute<E>;
  constexpr int64_t size = kHeight<E> * kColumns<T>, columns = kColumns<T>;
  alignas(64) T c[kBesideTiles<L, E> ? 2 * size : size];
  const int64_t count = padded_steps<E>(k);
  const Engine<E> engine;
  auto panel_at = [&](int64_t column) { return right + column * count * Step<E>::elements; };
  if constexpr (kBesideTiles<L, E>) {
    T *now = c, *before = c + size;
    for (int64_t column = 0; column < n; column += columns) {
      auto row = [&](int64_t i) __attribute__((always_inline)) { consume((const T*)before, column - columns, columns, i, i + 1); };
      Beside<decltype(row)> beside{row, column > 0 ? kHeight<E> : 0, count / kStepBlock<E> * kFours<L, E>};
      micro_kernel<Layout>(left, panel_at(column), count, n - column, now, beside);
      beside.finish();
      T* const filled = now;
      now = before, before = filled;
    }
    const int64_t last = (n - 1) / columns * columns;
    if (n > 0) consume((const T*)before, last, n - last, 0, kHeight<E>);
  } else {
    Nothing nothing;
    for (int64_t column = 0; column < n; column += columns) {
      micro_kernel<Layout>(left, panel_at(column), count, n - column, c, nothing);
      consume((const T*)c, column, smaller(n - column, columns), 0, kHeight<E>);
    }
  }
}

// All columns of kHeight rows into sums, [kHeight][kColumns] for each panel; number (i, column) lies at sums_at. `beside` is called where tiles leave
// it time, in all as often as slots_beside says; its finish() is the caller's.
template <class E> INLINE Compute<E>* sums_at(Compute<E>* sums, int64_t i, int64_t column) {
  constexpr int64_t columns = kColumns<Compute<E>>;
  return sums + (column / columns * kHeight<E> + i) * columns + column % columns;
}
template <class L, class E> INLINE int64_t slots_beside(int64_t k, int64_t n) {
  return (n + kColumns<Compute<E>> - 1) / kColumns<Compute<E>> * (padded_steps<E>(k) / kStepBlock<E>) * kFours<L, E>;
}
template <class Layout, class L, class E, class F>
INLINE void multiply_beside(const L* left, const E* right, int64_t k, int64_t n, Compute<E>* sums, F& beside) {
  constexpr int64_t columns = kColumns<Compute<E>>;
  const int64_t count = padded_steps<E>(k);
  const Engine<E> engine;
  Nothing nothing;
  for (int64_t column = 0; column < n; column += columns) {
    const E* panel = right + column * count * Step<E>::elements;
    if constexpr (kBesideTiles<L, E>) micro_kernel<Layout>(left, panel, count, n - column, sums_at<E>(sums, 0, column), beside);
    else micro_kernel<Layout>(left, panel, count, n - column, sums_at<E>(sums, 0, column), nothing);
  }
}

// For tiles: sums (+)= the product of `strips` left operands, `each` apart, a panel of the right operand after the other; kTile numbers,
// [kHeight][kColumns], for each strip and panel, at sums + (panel * strips + strip) * kTile. Tiles are faster than the second-level cache: of a
// panel as many steps as stay in the first serve one strip after the other.
template <class L, class E, class F>
INLINE void multiply_strips(const L* left, int64_t each, int64_t strips, const E* right, int64_t k, int64_t n, float* sums, bool add, F& beside) {
#if defined(__AMX_BF16__)
  constexpr int64_t per = Step<E>::elements, columns = kColumns<float>;
  constexpr int lines = 3;                                    // of the sums that come next
  typedef void Kernel(const L*, const E*, int64_t, float*, const void*, int64_t, F&);
  static Kernel* const kernels[2][2] = {{tile_kernel<L, E, 1, false, lines, F>, tile_kernel<L, E, 1, true, lines, F>},
                                        {tile_kernel<L, E, 2, false, lines, F>, tile_kernel<L, E, 2, true, lines, F>}};
  const int64_t count = padded_steps<E>(k);
  const Engine<E> engine;
  for (int64_t column = 0; column < n; column += columns, sums += strips * kTile)
    for (int64_t start = 0; start == 0 || start < count; start += kPart<E>)
      for (int64_t strip = 0; strip < strips; ++strip) {
        float* c = sums + strip * kTile;
        kernels[n - column > columns / 2][add || start > 0](left + strip * each + start * kHeight<E> * per, right + (column * count + start * columns) * per,
                                                           smaller(kPart<E>, count - start), c, c + kTile, kTile * sizeof(float) / 64, beside);
        if (start + kPart<E> >= count) beside.served(strip);
      }
#endif
}

// What waits of `strips` strips by n columns: sums as multiply_strips gives them. put(row, c, column) gets those of a row, panel by panel.
INLINE int64_t sums_size(int64_t strips, int64_t n) { return strips * (kTile / kColumns<float>) * round_up(n, kColumns<float>); }
template <class F> INLINE void put_row(const float* sums, int64_t strips, int64_t row, int64_t n, F put) {
  for (int64_t column = 0; column < n; column += kColumns<float>) put(row, sums + sums_size(strips, column) + row * kColumns<float>, column);
}

// Strips of kHeight columns that one job packs side by side, at most: a row's share is a few cache lines.
template <class E> constexpr int kMostStrips = kTiles<E> ? 8 : 48 / kHeight<E>;
// The rows of a product of `strips` left operands go out some columns at a time: short pieces, far apart, take memory as long as the product
// takes.
constexpr int64_t kColumnsTogether = 256;
template <class E> constexpr int64_t kRowSums = kTiles<E> ? kMostStrips<E> * (kTile / kColumns<float>) * kColumnsTogether : 0;

// put(row, c, column) for `height` rows of the product of `strips` left operands in columns. sums: kRowSums of E. Beside tiles the right operand,
// which the first strip finds in another core's cache or further away, is asked for a part ahead. Not so the results: to memory that is in no
// cache they go faster without tiles that wait for it.
template <class L, class E, class F>
INLINE void multiply_rows(const L* left, int64_t each, int64_t strips, int64_t height, const E* right, int64_t k, int64_t n, float* sums, F put) {
  if constexpr (!kTiles<E>) {
    for (int64_t s = 0; s < strips; ++s)
      multiply<Columns>(left + s * each, right, k, n, [&](const Compute<E>* c, int64_t column, int64_t, int64_t from, int64_t to) {
        for (int64_t i = from; i < smaller(to, height - s * kHeight<E>); ++i) put(s * kHeight<E> + i, c + i * kColumns<Compute<E>>, column);
      });
  } else {
    constexpr int64_t columns = kColumns<float>, lines = 4;
    const int64_t panel_size = right_size<E>(k, columns);
    for (int64_t begin = 0; begin < n; begin += kColumnsTogether) {
      const int64_t width = smaller(kColumnsTogether, n - begin), panels = (width + columns - 1) / columns;
      const E* const from = right + begin / columns * panel_size;
      const char* const coming = (const char*)(from + kPart<E> * columns * Step<E>::elements);
      auto piece = [&](int64_t number) __attribute__((always_inline)) {
        for (int64_t line = number * lines; line < (number + 1) * lines; ++line) __builtin_prefetch(coming + line * 64, 0, 2);
      };
      Beside<decltype(piece)> beside{piece, panels * panel_size * int64_t(sizeof(E)) / (64 * lines),
                                     padded_steps<E>(k) / kStepBlock<E> * kFours<L, E> * strips * panels};
      multiply_strips(left, each, strips, from, k, width, sums, false, beside);
      for (int64_t row = 0; row < height; ++row)
        put_row(sums, strips, row, width,
                [&](int64_t r, const float* c, int64_t column) __attribute__((always_inline)) { put(r, c, begin + column); });
    }
  }
}

// The size of groups of `count` pieces: as many groups for each thread, none larger than `most`.
INLINE int64_t group_size(int64_t count, int64_t threads, int64_t most) {
  const int64_t turns = (count + threads * most - 1) / (threads * most);
  return turns ? (count + threads * turns - 1) / (threads * turns) : 1;
}

// ---- packing ------------------------------------------------------------------------------------------------------------------

template <class T, class L> INLINE Vector<T> load_as(const L* p, int64_t n) { return load(p, n); }
template <class T> INLINE Vector<T> load_as(const int8_t* p, int64_t n) { return load_signs<T>(p, n); }

// A step of the columns at p, of which n exist; bf16 takes two rows, and zeros where `next` is null.
template <class T, class L> INLINE Steps<T> row_step(T*, const L* row, const L*, int64_t n) { return {load_as<T>(row, n)}; }
// The steps from p on of a row of which n numbers are left.
template <class T, class S> INLINE Steps<T> steps_at(T*, const S* p, int64_t n) { return {load(p, n)}; }
// The same of a row that vector(d) gives, n numbers from d on being left.
template <class T, class F> INLINE Steps<T> steps_from(T*, int64_t d, int64_t n, F vector) { return {n > 0 ? vector(d) : Vector<T>{}}; }
// total and the elements of a step, lane by lane.
template <class T> INLINE Vector<T> add_steps(Vector<T> total, Steps<T> steps) { return total + steps.part[0]; }
#if defined(__AVX512BF16__)
// 16 operands of bf16. The conversion takes subnormals for 0, as the dot product does.
INLINE __m256i bf16_operands(const bf16* p, int64_t n) { return (__m256i)masked(p, n < 16 ? (1u << n) - 1 : ~0u); }
// Lane i holds the operands i of two rows.
INLINE Vector<uint32_t> interleave_rows(Vector<uint32_t> rows) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Vector<uint32_t>)_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)rows);
}
INLINE Vector<uint32_t> rounded(Vector<float> first, Vector<float> second) {
  return (Vector<uint32_t>)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
INLINE Steps<bf16> row_step(bf16*, const bf16* row, const bf16* next, int64_t n) {
  const __m256i second = next ? bf16_operands(next, n) : __m256i{};
  return {interleave_rows((Vector<uint32_t>)_mm512_inserti64x4(_mm512_castsi256_si512(bf16_operands(row, n)), second, 1))};
}
template <class L> INLINE Steps<bf16> row_step(bf16*, const L* row, const L* next, int64_t n) {
  return {interleave_rows(rounded(load_as<float>(row, n), next ? load_as<float>(next, n) : Vector<float>{}))};
}
template <class S> INLINE Steps<bf16> steps_at(bf16*, const S* p, int64_t n) { return {rounded(load(p, n), load(p + 16, n > 16 ? n - 16 : 0))}; }
INLINE Steps<bf16> steps_at(bf16*, const bf16* p, int64_t n) {
  return {(Vector<uint32_t>)_mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : ~0u, p)};
}
template <class F> INLINE Steps<bf16> steps_from(bf16*, int64_t d, int64_t n, F vector) {
  const auto first = n > 0 ? vector(d) : Vector<float>{};
  return {rounded(first, n > 16 ? vector(d + 16) : Vector<float>{})};
}
INLINE Vector<float> add_steps(Vector<float> total, Steps<bf16> steps) { return multiply_add(total, Step<bf16>::one, steps.part[0]); }
#endif
#if defined(__AMX_BF16__)
// A word of each pair of floats, their upper halves.
INLINE Vector<uint32_t> upper_halves(Vector<float> first, Vector<float> second) {
  return (Vector<uint32_t>)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)((Vector<uint32_t>)first >> 16), (__m512i)second);
}
// Steps of two elements from the vectors of the first and of the second ones, without a shuffle. x1 is cut off, not rounded: its 8 bits and
// those of x2 hold all that x0 leaves, and as x0 is rounded the products left out have either sign.
INLINE Steps<bf16x3> split(Vector<float> first, Vector<float> second) {
  typedef Vector<uint32_t> Bits;
  constexpr uint32_t upper = 0xffff0000;
  const auto a = (Vector<float>)(((Bits)first + 0x8000) & upper), b = (Vector<float>)(((Bits)second + 0x8000) & upper);
  const auto rest_a = first - a, rest_b = second - b;
  return {{upper_halves(a, b), upper_halves(rest_a, rest_b),
           upper_halves(rest_a - (Vector<float>)((Bits)rest_a & upper), rest_b - (Vector<float>)((Bits)rest_b & upper))}};
}
// Steps from 32 elements in a row.
INLINE Steps<bf16x3> split_row(Vector<float> low, Vector<float> high) {
  alignas(64) static constexpr uint32_t order[16] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const __m512i even = _mm512_load_si512(order), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return split((Vector<float>)_mm512_permutex2var_ps((__m512)low, even, (__m512)high), (Vector<float>)_mm512_permutex2var_ps((__m512)low, odd, (__m512)high));
}
template <class L> INLINE Steps<bf16x3> row_step(bf16x3*, const L* row, const L* next, int64_t n) {
  return split(load_as<float>(row, n), next ? load_as<float>(next, n) : Vector<float>{});
}
template <class S> INLINE Steps<bf16x3> steps_at(bf16x3*, const S* p, int64_t n) { return split_row(load(p, n), load(p + 16, n > 16 ? n - 16 : 0)); }
template <class F> INLINE Steps<bf16x3> steps_from(bf16x3*, int64_t d, int64_t n, F vector) {
  const auto first = n > 0 ? vector(d) : Vector<float>{};
  return split_row(first, n > 16 ? vector(d + 16) : Vector<float>{});
}
INLINE Vector<float> add_steps(Vector<float> total, Vector<float> row) { return total + row; }
#endif

// Steps of the left operand, elements d and on of row i.
template <class E> INLINE void put_left(E* left, int i, int64_t d, Steps<E> steps) {
  constexpr int strip = kStripLength<E>, parts = Step<E>::parts, per = Step<E>::elements;
  for (int part = 0; part < parts; ++part)
    __builtin_memcpy((Word<E>*)left + ((d / strip * parts + part) * kHeight<E> + i) * strip / per + d % strip / per, &steps.part[part], kBytes);
}

// Row i of the left operand, k elements; load(column, n) gives a vector. It is asked for them in their order.
template <class E, class F> INLINE void pack_left(E* left, int i, int64_t k, F load_at) {
  constexpr int64_t lanes = Lanes<Compute<E>>::count, some = Lanes<Word<E>>::count * Step<E>::elements;
  for (int64_t d = 0; d < k; d += some)
    put_left(left, i, d, steps_from((E*)0, d, k - d, [&](int64_t at) __attribute__((always_inline)) { return load_at(at, smaller(lanes, k - at)); }));
}

// kHeight rows of the left operand from k numbers of rows as they stand, `pitch` apart; those past `height` are zero. In pieces, to be packed
// beside tiles: some rows of a strip.
template <class E> constexpr int kPieceRows = Step<E>::parts == 3 ? 4 : kTiles<E> ? 16 : kHeight<E>;
template <class E> INLINE int64_t left_pieces(int64_t k) { return (k + kStripLength<E> - 1) / kStripLength<E> * (kHeight<E> / kPieceRows<E>); }
template <class E, class S> INLINE void pack_left_piece(E* left, const S* rows, int64_t pitch, int64_t k, int64_t height, int64_t piece) {
  constexpr int64_t some = Lanes<Word<E>>::count * Step<E>::elements, groups = kHeight<E> / kPieceRows<E>;
  const int first = int(piece % groups) * kPieceRows<E>;
  const int64_t strip = piece / groups * kStripLength<E>;
  for (int i = first; i < first + kPieceRows<E>; ++i)
#pragma GCC unroll 4
    for (int64_t v = 0; v < kStripLength<E>; v += some)
      if (v == 0 || strip + v < k) put_left(left, i, strip + v, i < height ? steps_at((E*)0, rows + i * pitch + strip + v, k - strip - v) : Steps<E>{});
}
template <class E, class S> INLINE void pack_left_rows(E* left, const S* rows, int64_t pitch, int64_t k, int64_t height) {
  for (int64_t piece = 0; piece < left_pieces<E>(k); ++piece) pack_left_piece(left, rows, pitch, k, height, piece);
}

// Where the word of a step and a column lies in the panels of the right operand, in its first part; the next one is kNextPart on.
template <class E> constexpr int64_t kNextPart = kStepBlock<E> * kColumns<Compute<E>>;
template <class E> INLINE Word<E>* right_place(E* right, int64_t count, int64_t step, int64_t column) {
  constexpr int64_t columns = kColumns<Compute<E>>, block = kStepBlock<E>, parts = Step<E>::parts;
  const int64_t start = column / columns * columns * count * parts;
  return (Word<E>*)right + start + step / block * parts * kNextPart<E> + step % block * columns + column % columns;
}

// Step number r / elements of the right operand from row r of n numbers (and, for bf16, the next one) as they stand; the last one fills up
// with zeros. With `one`, a column of ones follows them.
template <class E, class R> INLINE void pack_right(E* right, int64_t r, int64_t k, int64_t n, const R* row, const R* next, bool one) {
  constexpr int lanes = Lanes<Word<E>>::count, parts = Step<E>::parts;
  const int64_t count = padded_steps<E>(k), place = r / Step<E>::elements;
  for (int64_t d = 0; d < n + one; d += lanes) {
    auto step = row_step((E*)0, row + d, next ? next + d : nullptr, n - d);
    if (one && n - d < lanes) step.part[0][n - d] = Step<E>::one;
    for (int part = 0; part < parts; ++part) __builtin_memcpy(right_place(right, count, place, d) + part * kNextPart<E>, &step.part[part], kBytes);
    if (kTiles<E> && r + Step<E>::elements >= k)
      for (int64_t filler = place + 1; filler < count; ++filler)
        for (int part = 0; part < parts; ++part) __builtin_memset(right_place(right, count, filler, d) + part * kNextPart<E>, 0, kBytes);
  }
}

// The same from row r of a weight [k, n].
template <class E, class S> INLINE void pack_weight_rows(E* right, const S* weight, int64_t k, int64_t n, int64_t r) {
  pack_right(right, r, k, n, weight + r * n, r + 1 < k ? weight + (r + 1) * n : nullptr, false);
}

// The panel of the right operand that starts at `column`, from a weight [n, k] that multiplies as its transpose; row(i) is its row i. In pieces,
// to be packed beside tiles: squares of words change sides, from one piece to the next in `square`; of bf16x3 it is whole floats, before they
// are split, which makes fewer squares.
template <class E> constexpr int kSquarePieces = Step<E>::parts == 3 ? 3 : 2;
template <class E> struct Square { Vector<Word<E>> row[Lanes<Word<E>>::count]; };
template <class E> INLINE int64_t transposed_pieces(int64_t k) {
  constexpr int64_t lanes = Lanes<Word<E>>::count, across = kColumns<Compute<E>> / lanes;
  const int64_t numbers = padded_steps<E>(k) * (Step<E>::parts == 3 ? Step<E>::elements : 1);
  return (numbers + lanes - 1) / lanes * across * kSquarePieces<E>;
}
template <class E, class F>
INLINE void pack_transposed_piece(E* right, F row, int64_t k, int64_t n, int64_t column, int64_t piece, Square<E>* square) {
  constexpr int lanes = Lanes<Word<E>>::count, columns = kColumns<Compute<E>>, per = Step<E>::elements, parts = Step<E>::parts;
  const int64_t which = piece % kSquarePieces<E>, number = piece / kSquarePieces<E>;
  const int64_t c = number % (columns / lanes) * lanes, at = number / (columns / lanes) * lanes;
  const int64_t count = padded_steps<E>(k), rows = n - column - c;
  if (rows <= 0) return;
  Word<E>* const to = right_place(right, count, parts == 3 ? at / per : at, column + c);
  Vector<Word<E>> turned[lanes];
  if constexpr (parts == 1) {
    if (which == 0) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
        square->row[i] = i < rows ? steps_at((E*)0, row(column + c + i) + at * per, k - at * per).part[0] : Vector<Word<E>>{};
      return;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) turned[i] = square->row[i];
    transpose_square<Word<E>>(turned);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if (at + i < count) __builtin_memcpy(to + i * columns, &turned[i], kBytes);
  } else if (which == 0) {
    if (rows >= lanes && k - at >= lanes) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) turned[i] = (Vector<Word<E>>)load(row(column + c + i) + at);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) turned[i] = (Vector<Word<E>>)(i < rows && at < k ? load(row(column + c + i) + at, k - at) : Vector<float>{});
    }
    transpose_square<Word<E>>(turned);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) square->row[i] = turned[i];
  } else {
    const int64_t first = (which - 1) * (lanes / 2);
#pragma GCC unroll 4
    for (int i = 0; i < lanes / 2; i += per) {
      const auto steps = row_step((E*)0, (const float*)&square->row[first + i], (const float*)&square->row[first + i + 1], lanes);
      for (int part = 0; part < parts; ++part) __builtin_memcpy(to + part * kNextPart<E> + (first + i) / per * columns, &steps.part[part], kBytes);
    }
  }
}
template <class E, class F> static void pack_transposed(E* right, F row, int64_t k, int64_t n, int64_t column) {
  Square<E> square;
  for (int64_t piece = 0; piece < transposed_pieces<E>(k); ++piece) pack_transposed_piece(right, row, k, n, column, piece, &square);
}

// ---- gradients of weights and biases ------------------------------------------------------------------------------------------

constexpr int64_t kChunk = 512;   // rows of the batch per pass
constexpr int64_t kBlock = 16;    // rows packed by one job; a multiple of every step

// One gradient: weight [m, n] = scale left^T right and bias [m] = scale left^T 1, left being [rows, m]. The bias is one more column
// of the right operand, all ones.
template <class S, class P = S> struct WeightGradient {
  const Operand<S>* left;  // of this pass alone; or, where it is null,
  const int8_t* signs;     // of all rows
  const S* rows;           // the right operand [rows, n]; or, where it is null,
  const Operand<S>* made;  // that of this pass alone
  int64_t m, n;
  P *weight, *bias;
  Compute<S> scale;
  Packed<S>* right;        // scratch, right_size(kChunk, n + 1)
  bool packed;             // an earlier gradient has the same right operand and scratch, or somebody else packs it, with a column of ones
  Compute<S>* total;       // scratch, [m][round_up(n + 1, kColumns)], used where there is more than one chunk
};

// Scratch per thread of weight_gradients. Whole vectors are stored, so the last step of a strip writes past its end.
template <class E> constexpr int64_t kStrip = left_size<E>(kChunk);
template <class E> constexpr int64_t kStrips = kMostStrips<E> * kStrip<E>;

// `count` steps of `strips` left operands, kHeight columns each, from the transpose of k rows of m numbers, of which `there` are left from
// `left` on; strip s begins at to + s * each. see(s, i, step) gets the step of columns i to i + lanes of strip s
// (of bf16x3, its rows one after the other).
template <class E, class L, class F>
INLINE void pack_left_columns(E* to, int64_t each, const L* left, int64_t m, int64_t there, int64_t k, int64_t strips, F see) {
  using U = Word<E>;
  constexpr int per = Step<E>::elements, parts = Step<E>::parts, lanes = Lanes<U>::count, height = kHeight<E>;
  auto step_at = [&](int64_t r, int64_t column) __attribute__((always_inline)) {
    const L* row = left + r * m + column;
    return row_step((E*)0, row, r + 1 < k ? row + m : nullptr, there > column ? there - column : 0);
  };
  if constexpr (!kTiles<E>) {
    for (int64_t r = 0; r < k; r += per) {
      ask<1>(left + (r + 8) * m, strips * height);
      for (int64_t s = 0; s < strips; ++s)
        for (int i = 0; i < height; i += lanes) {
          const auto step = step_at(r, s * height + i);
          __builtin_memcpy((U*)(to + s * each) + r / per * height + i, &step, kBytes);
          see(s, i, step);
        }
    }
  } else {                                                    // a strip's rows are columns here: squares of vectors change sides
    for (int64_t r = 0; r < k; r += per * lanes)
      for (int64_t s = 0; s < strips; ++s)
        for (int i = 0; i < height; i += lanes) {
          U* out = (U*)(to + s * each) + (r / (per * lanes) * parts * height + i) * lanes;
          if constexpr (parts == 1) {
            Vector<U> square[lanes];
#pragma GCC unroll 16
            for (int step = 0; step < lanes; ++step) {
              const auto steps = r + per * step < k ? step_at(r + per * step, s * height + i) : Steps<E>{};
              square[step] = steps.part[0];
              see(s, i, steps);
            }
            transpose_square<U>(square);
#pragma GCC unroll 16
            for (int row = 0; row < lanes; ++row) __builtin_memcpy(out + row * lanes, &square[row], kBytes);
          } else {                                            // whole numbers, as in pack_transposed: the first ones of steps, and the second ones
            Vector<float> square[2][lanes];
            const int64_t columns = there - s * height - i;
#pragma GCC unroll 32
            for (int row = 0; row < 2 * lanes; ++row) {
              const auto numbers = r + row < k && columns > 0 ? load_as<float>(left + (r + row) * m + s * height + i, columns) : Vector<float>{};
              square[row % 2][row / 2] = numbers;
              see(s, i, numbers);
            }
            transpose_square<float>(square[0]);
            transpose_square<float>(square[1]);
#pragma GCC unroll 16
            for (int row = 0; row < lanes; ++row) {
              const auto steps = split(square[0][row], square[1][row]);
              for (int part = 0; part < parts; ++part) __builtin_memcpy(out + (part * height + row) * lanes, &steps.part[part], kBytes);
            }
          }
        }
  }
}

// One pass: adds kChunk rows from `start` on, or those that are left. Called by all threads of a parallel region, pass after pass, and once
// where there are no rows. The rows are summed in their order, whatever the number of threads: threads divide the rows of the result.
// For this thread, strips: kStrips of E; own: where there are tiles, right_size(kChunk, n + 1) of the widest with `rows`; sums: kRowSums of E.
template <class S, class P>
static void weight_gradients(WeightGradient<S, P>* gradients, int count, int64_t start, int64_t rows, Packed<S>* strips, Packed<S>* own, float* sums) {
  using E = Packed<S>;
  using T = Compute<S>;
  constexpr int per = Step<E>::elements, lanes = Lanes<T>::count;
  const int64_t k = smaller(kChunk, rows - start), blocks = (k + kBlock - 1) / kBlock;
  auto pack = [&](const WeightGradient<S, P>& g, E* to, int64_t first, int64_t end) {
    auto from = [&](const auto* row) __attribute__((always_inline)) {
      for (int64_t r = first; r < smaller(end, k); r += per)
        pack_right(to, r, k, g.n, row + r * g.n, per == 2 && r + 1 < k ? row + (r + 1) * g.n : nullptr, true);
    };
    if (g.rows) from(g.rows + start * g.n);
    else from(g.made);
  };
  if (!kTiles<E>) {
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < count * blocks; ++job) {
      const WeightGradient<S, P> g = gradients[job / blocks];     // a copy: stores might change the original, for all the compiler knows
      if (!g.packed) pack(g, g.right, job % blocks * kBlock, (job % blocks + 1) * kBlock);
    }
  }
  // Threads divide all strips of all gradients in their order, by what they cost: so each takes part in few gradients, and mostly in those whose
  // operands it has made itself, where rows and modalities are divided the same way.
  auto strips_of = [](const WeightGradient<S, P>& g) { return (g.m + kHeight<E> - 1) / kHeight<E>; };
  auto strip_cost = [](const WeightGradient<S, P>& g) { return round_up(g.n + 1, kColumns<T>) * (g.left ? kFours<E, E> : kFours<PackedSigns<S>, E>); };
  int64_t work = 0, before = 0;
  for (int p = 0; p < count; ++p) work += strips_of(gradients[p]) * strip_cost(gradients[p]);
  const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
  // A thread with tiles packs for itself: what another core has packed costs as much to fetch, line by line, and as much again to overwrite.
  const void* packed_rows = nullptr;
  for (int p = 0; p < count; ++p) {
    const WeightGradient<S, P> g = gradients[p];
    const int64_t cost = strip_cost(g);
    auto strip_at = [&](int64_t place) {                       // the first one that starts there or after it
      const int64_t strip = (place - before + cost - 1) / cost;
      return strip < 0 ? 0 : smaller(strip, strips_of(g));
    };
    int64_t strip = strip_at(work * thread / threads);
    const int64_t end = strip_at(work * (thread + 1) / threads);
    before += strips_of(g) * cost;
    if (strip >= end) continue;
    const E* right = g.right;
    if (kTiles<E>) {
      const void* const from = g.rows ? (const void*)g.rows : g.made;
      if (packed_rows != from) pack(g, own, 0, k);
      packed_rows = from;
      right = own;
    }
    const int64_t together = group_size(end - strip, 1, kMostStrips<E>), stride = round_up(g.n + 1, kColumns<T>);
    for (; strip < end; strip += together) {
      const int64_t first = strip * kHeight<E>, used = smaller(together, end - strip), height = smaller(used * kHeight<E>, g.m - first);
      const bool last = start + k == rows;
      auto put = [&](int64_t row, const T* c, int64_t column) __attribute__((always_inline)) {
        for (int64_t v = 0; v < smaller(kColumns<T>, g.n + 1 - column); v += lanes) {
          T* total = g.total + (first + row) * stride + column + v;
          auto value = load(c + v);
          if (start > 0) value += load(total);
          if (!last) {
            store(total, value);
            continue;
          }
          value *= g.scale;
          const int64_t left_of_bias = g.n - column - v;
          store(g.weight + (first + row) * g.n + column + v, value, smaller(left_of_bias, lanes));
          if (left_of_bias < lanes) {
            T part[lanes];
            store(part, value);
            store(g.bias + first + row, broadcast<T>(part[left_of_bias]), 1);
          }
        }
      };
      auto run = [&](auto* packed, auto* left) __attribute__((always_inline)) {
        pack_left_columns(packed, kStrip<E>, left + first, g.m, g.m - first, k, used, [](int64_t, int, auto) {});
        multiply_rows(packed, kStrip<E>, used, height, right, k, g.n + 1, sums, put);
      };
      if (g.left) run(strips, g.left);
      else run((PackedSigns<S>*)strips, g.signs + start * g.m);
    }
  }
#pragma omp barrier
}
