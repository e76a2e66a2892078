// Philox4x32-10 (Salmon et al., SC 2011) for dropout, vectorised over the blocks of a row. The layout is that of
// ada2i_fast/ops/dropout.py: column d of row n, stream j, is word d % 4 of the block with counter (d / 4, n low, n high, j).

typedef Vector<uint64_t> Wide;   // one 32-bit number per lane; what stands above it is ignored

INLINE Wide multiply(Wide a, uint32_t b) {
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * uint64_t(b);
#endif
}

// a0 b0 a1 b1 ..
INLINE void interleave(Wide a, Wide b, uint32_t* out) {
  constexpr int lanes = Lanes<uint64_t>::count;
#if defined(__AVX512F__)
  Wide low = (Wide)_mm512_permutex2var_epi64((__m512i)a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), (__m512i)b);
  Wide high = (Wide)_mm512_permutex2var_epi64((__m512i)a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), (__m512i)b);
#else
  Wide low, high;
  for (int i = 0; i < lanes; ++i) {
    (i < lanes / 2 ? low : high)[2 * i % lanes] = a[i];
    (i < lanes / 2 ? low : high)[2 * i % lanes + 1] = b[i];
  }
#endif
  __builtin_memcpy(out, &low, sizeof low);
  __builtin_memcpy(out + 2 * lanes, &high, sizeof high);
}

template <int n> struct Number { constexpr int operator()() const { return n; } };

constexpr int kWords = kBytes / 2;   // columns per call: four words for each 64-bit lane

// The words of `blocks` vectors of counters, which are overwritten. Several hide each other's latency.
template <int blocks> INLINE void philox_rounds(uint64_t seed, Wide* c0, Wide* c1, Wide* c2, Wide* c3, uint32_t* words) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 8
    for (int k = 0; k < blocks; ++k) {
      Wide p0 = multiply(c0[k], 0xD2511F53u), p1 = multiply(c2[k], 0xCD9E8D57u);
      c0[k] = (p1 >> 32) ^ c1[k] ^ key0;
      c1[k] = p1;
      c2[k] = (p0 >> 32) ^ c3[k] ^ key1;
      c3[k] = p0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
#pragma GCC unroll 8
  for (int k = 0; k < blocks; ++k) {
    Wide first = (c0[k] & 0xffffffffu) | (c1[k] << 32), second = (c2[k] & 0xffffffffu) | (c3[k] << 32);
    interleave(first, second, words + k * kWords);
  }
}

// words[i] for columns column .. column + blocks * kWords - 1; column is a multiple of 4.
template <int blocks> INLINE void philox_blocks(uint64_t seed, int64_t row, uint32_t stream, int64_t column, uint32_t* words) {
  constexpr int lanes = Lanes<uint64_t>::count;
  Wide order, c0[blocks], c1[blocks], c2[blocks], c3[blocks];
  for (int i = 0; i < lanes; ++i) order[i] = uint64_t(i);
  for (int k = 0; k < blocks; ++k) {
    c0[k] = order + uint64_t(column / 4 + k * lanes);
    c1[k] = broadcast<uint64_t>(uint32_t(row));
    c2[k] = broadcast<uint64_t>(uint64_t(row) >> 32);
    c3[k] = broadcast<uint64_t>(stream);
  }
  philox_rounds<blocks>(seed, c0, c1, c2, c3, words);
}

INLINE void philox(uint64_t seed, int64_t row, uint32_t stream, int64_t column, uint32_t* words) {
  philox_blocks<1>(seed, row, stream, column, words);
}

// The words of `count` rows from `row` on, columns 0 .. 4 * quads - 1, one row after the other. A vector of counters runs over the ends of
// rows, so short ones share it. Writes whole vectors: up to 4 * kWords words too many.
INLINE void philox_rows(uint64_t seed, int64_t row, uint32_t stream, int64_t quads, int64_t count, uint32_t* words) {
  constexpr int lanes = Lanes<uint64_t>::count;
  typedef Vector<int64_t> Signed;   // compares of signed numbers exist in more instruction sets
  Signed column, n;
  for (int i = 0; i < lanes; ++i) column[i] = i % quads, n[i] = row + i / quads;
  const int64_t columns = lanes % quads, rows = lanes / quads;
  auto draw = [&](auto number) __attribute__((always_inline)) {
    constexpr int blocks = number();
    Wide c0[blocks], c1[blocks], c2[blocks], c3[blocks];
#pragma GCC unroll 8
    for (int k = 0; k < blocks; ++k) {
      c0[k] = (Wide)column;
      c1[k] = (Wide)n;
      c2[k] = (Wide)n >> 32;
      c3[k] = broadcast<uint64_t>(stream);
      const Signed next = column + columns, over = next >= quads;   // -1 in lanes that left their row
      column = next - (over & quads);
      n += rows - over;
    }
    philox_rounds<blocks>(seed, c0, c1, c2, c3, words);
    words += blocks * kWords;
  };
  int64_t left = (count * quads + lanes - 1) / lanes;
  for (; left > 2; left -= 4) draw(Number<4>());
  for (; left > 0; --left) draw(Number<1>());
}

// Words below round(p 2^32) drop their element.
INLINE uint32_t dropout_threshold(double p) {
  const double limit = __builtin_nearbyint(p * 4294967296.0);
  return limit < 4294967295.0 ? uint32_t(limit) : 0xffffffffu;
}

// Which lanes are kept: those whose word is at least the threshold. Bit i is lane i.
INLINE uint32_t kept_lanes(const uint32_t* words, uint32_t threshold, float*) {
  Vector<uint32_t> word;
  __builtin_memcpy(&word, words, sizeof word);
#if defined(ADA2I_MASKS)
  return _mm512_cmpge_epu32_mask((__m512i)word, _mm512_set1_epi32(int(threshold)));
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)(word >= threshold)));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps((__m128)(word >= threshold)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < Lanes<float>::count; ++i) bits |= uint32_t(word[i] >= threshold) << i;
  return bits;
#endif
}
INLINE uint32_t kept_lanes(const uint32_t* words, uint32_t threshold, double*) {
  uint32_t bits = 0;
  for (int i = 0; i < Lanes<double>::count; ++i) bits |= uint32_t(words[i] >= threshold) << i;
  return bits;
}

// The same of the row's `columns` columns from `column` on, at most kWords.
template <class T, int columns> INLINE uint32_t kept_columns(uint64_t seed, int64_t row, uint32_t stream, int64_t column, uint32_t threshold) {
  constexpr int lanes = Lanes<T>::count;
  uint32_t words[kWords], bits = 0;
  philox(seed, row, stream, column, words);
#pragma GCC unroll 4
  for (int v = 0; v < columns; v += lanes) bits |= kept_lanes(words + v, threshold, (T*)0) << v;
  return bits;
}

// value * kept in the lanes whose bit is set, else 0.
template <class T> INLINE Vector<T> keep(Vector<T> value, uint32_t bits, T kept) {
#if defined(ADA2I_MASKS)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_maskz_mul_ps(__mmask16(bits), (__m512)value, _mm512_set1_ps(kept));
  else return (Vector<T>)_mm512_maskz_mul_pd(__mmask8(bits), (__m512d)value, _mm512_set1_pd(kept));
#else
  typedef Vector<typename LaneNumber<sizeof(T)>::type> Lane;
  Lane bit;
  for (int i = 0; i < Lanes<T>::count; ++i) bit[i] = 1 << i;
  return ((Lane{} + bits) & bit) != 0 ? value * kept : Vector<T>{};
#endif
}

// value * kept where the word is at least the threshold, else 0.
INLINE Vector<float> keep(Vector<float> value, const uint32_t* words, uint32_t threshold, float kept) {
  Vector<uint32_t> word;
  __builtin_memcpy(&word, words, sizeof word);
  return word >= threshold ? value * kept : Vector<float>{};
}
