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

constexpr int kWords = kBytes / 2;   // columns per call: four words for each 64-bit lane

// words[i] for columns column .. column + blocks * kWords - 1; column is a multiple of 4. Several blocks hide each other's latency.
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

INLINE void philox(uint64_t seed, int64_t row, uint32_t stream, int64_t column, uint32_t* words) {
  philox_blocks<1>(seed, row, stream, column, words);
}

// Words below round(p 2^32) drop their element.
INLINE uint32_t dropout_threshold(double p) {
  const double limit = __builtin_nearbyint(p * 4294967296.0);
  return limit < 4294967295.0 ? uint32_t(limit) : 0xffffffffu;
}

// value * kept where the word is at least the threshold, else 0.
INLINE Vector<float> keep(Vector<float> value, const uint32_t* words, uint32_t threshold, float kept) {
  Vector<uint32_t> word;
  __builtin_memcpy(&word, words, sizeof word);
  return word >= threshold ? value * kept : Vector<float>{};
}
INLINE Vector<double> keep(Vector<double> value, const uint32_t* words, uint32_t threshold, double kept) {
  Vector<uint64_t> word;
  for (int i = 0; i < Lanes<double>::count; ++i) word[i] = words[i];
  return word >= uint64_t(threshold) ? value * kept : Vector<double>{};
}
