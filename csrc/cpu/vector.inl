// Vectors of one tier: as wide as the instruction set the file is compiled for. GCC and Clang vector extensions do the arithmetic;
// intrinsics appear only where the extensions have no word for it (masked edges, float16, the bf16 dot product).
//
// Storage types are float, double, bf16 and half; arithmetic is in double for double and in float for the rest.

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define INLINE static ALWAYS_INLINE

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define ADA2I_MASKS 1
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };

template <class S> struct Traits { using Compute = float; };
template <> struct Traits<double> { using Compute = double; };
template <class S> using Compute = typename Traits<S>::Compute;

template <class T> struct Lanes {
  static constexpr int count = kBytes / sizeof(T);
  typedef T type __attribute__((vector_size(kBytes)));
  typedef int8_t signs __attribute__((vector_size(kBytes / sizeof(T))));
};
template <class T> using Vector = typename Lanes<T>::type;
typedef uint16_t Vector16 __attribute__((vector_size(kBytes / 2)));

template <class T> INLINE Vector<T> broadcast(T value) { return value - Vector<T>{}; }

INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- between storage and arithmetic -------------------------------------------------------------------------------------------

INLINE float half_to_float(half h) {
  // Shift the exponent into place and let a multiplication by 2^112 repair its bias; subnormals come out right by the same product.
  uint32_t sign = uint32_t(h.bits & 0x8000) << 16, body = uint32_t(h.bits & 0x7fff) << 13;
  union { uint32_t u; float f; } value = {body}, scale = {uint32_t(254 - 15) << 23};
  value.f *= scale.f;
  if (body >= 0x0f800000u) value.u |= 0x7f800000u;  // infinity and NaN
  value.u |= sign;
  return value.f;
}

INLINE half float_to_half(float f) {
  union { float f; uint32_t u; } value = {f}, rounding;
  uint16_t sign = uint16_t(value.u >> 16 & 0x8000);
  value.u &= 0x7fffffffu;
  if (value.u > 0x7f800000u) return {uint16_t(sign | 0x7e00)};
  if (value.u >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};          // rounds to infinity
  if (value.u < 0x38800000u) {                                           // subnormal: the addition rounds to nearest even
    rounding.u = (127u - 15u + (23u - 10u) + 1u) << 23;
    value.f += rounding.f;
    return {uint16_t(sign | (value.u - rounding.u))};
  }
  value.u += ((15u - 127u) << 23) + 0xfffu + (value.u >> 13 & 1u);
  return {uint16_t(sign | value.u >> 13)};
}

template <class T> INLINE T to_compute(T value) { return value; }
INLINE float to_compute(bf16 value) { union { uint32_t u; float f; } bits = {uint32_t(value.bits) << 16}; return bits.f; }
INLINE float to_compute(half value) { return half_to_float(value); }

INLINE Vector<float> widen(Vector<float> raw, const float*) { return raw; }
INLINE Vector<double> widen(Vector<double> raw, const double*) { return raw; }
INLINE Vector<float> widen(Vector16 raw, const bf16*) {
  return (Vector<float>)(__builtin_convertvector(raw, Vector<uint32_t>) << 16);
}
INLINE Vector<float> widen(Vector16 raw, const half*) {
#if defined(ADA2I_MASKS)
  return (Vector<float>)_mm512_cvtph_ps((__m256i)raw);
#elif defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps((__m128i)raw);
#else
  Vector<float> value;
  for (int i = 0; i < Lanes<float>::count; ++i) value[i] = half_to_float({raw[i]});
  return value;
#endif
}

INLINE Vector<float> narrow(Vector<float> value, const float*) { return value; }
INLINE Vector<double> narrow(Vector<double> value, const double*) { return value; }
INLINE Vector16 narrow(Vector<float> value, const bf16*) {
#if defined(__AVX512BF16__)
  return (Vector16)_mm512_cvtneps_pbh((__m512)value);                      // subnormals become 0
#else
  auto bits = (Vector<uint32_t>)value;
  auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;               // to nearest, ties to even
  auto nan = (Vector<uint32_t>)(value != value);
  return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Vector16);
#endif
}
INLINE Vector16 narrow(Vector<float> value, const half*) {
#if defined(ADA2I_MASKS)
  return (Vector16)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Vector16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  Vector16 raw;
  for (int i = 0; i < Lanes<float>::count; ++i) raw[i] = float_to_half(value[i]).bits;
  return raw;
#endif
}

template <class S> struct Raw { typedef Vector16 type; };
template <> struct Raw<float> { typedef Vector<float> type; };
template <> struct Raw<double> { typedef Vector<double> type; };

// ---- loads and stores, of whole vectors and of the first n lanes (the others read as zero). No alignment is assumed. ----------

template <class S> INLINE Vector<Compute<S>> load(const S* p) {
  typename Raw<S>::type raw;
  __builtin_memcpy(&raw, p, sizeof raw);
  return widen(raw, p);
}

template <class S> INLINE void store(S* p, Vector<Compute<S>> value) {
  auto raw = narrow(value, (const S*)p);
  __builtin_memcpy(p, &raw, sizeof raw);
}

#if defined(ADA2I_MASKS)
INLINE Vector<float> masked(const float* p, uint32_t m) { return (Vector<float>)_mm512_maskz_loadu_ps(__mmask16(m), p); }
INLINE Vector<double> masked(const double* p, uint32_t m) { return (Vector<double>)_mm512_maskz_loadu_pd(__mmask8(m), p); }
template <class S> INLINE Vector16 masked(const S* p, uint32_t m) { return (Vector16)_mm256_maskz_loadu_epi16(__mmask16(m), p); }
INLINE void masked(float* p, uint32_t m, Vector<float> v) { _mm512_mask_storeu_ps(p, __mmask16(m), (__m512)v); }
INLINE void masked(double* p, uint32_t m, Vector<double> v) { _mm512_mask_storeu_pd(p, __mmask8(m), (__m512d)v); }
template <class S> INLINE void masked(S* p, uint32_t m, Vector16 v) { _mm256_mask_storeu_epi16(p, __mmask16(m), (__m256i)v); }
#endif

#if defined(__AVX2__) && !defined(ADA2I_MASKS)
// All ones in the first n of eight lanes of four bytes, or of four lanes of eight.
INLINE __m256i first_of(int64_t n, int bytes) {
  alignas(64) static constexpr int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256((const __m256i*)(ones + 8 - n * bytes / 4));
}
INLINE Vector<float> masked(const float* p, __m256i m) { return (Vector<float>)_mm256_maskload_ps(p, m); }
INLINE Vector<double> masked(const double* p, __m256i m) { return (Vector<double>)_mm256_maskload_pd(p, m); }
#endif

// The first n of less than a vector of numbers: halves of one, quarters and so on.
template <class S> INLINE void copy(S* to, const S* from, int64_t n) {
#pragma GCC unroll 3
  for (int size = Lanes<Compute<S>>::count / 2; size > 0; size /= 2)
    if (n & size) {
      __builtin_memcpy(to, from, size * sizeof(S));
      to += size, from += size;
    }
}

template <class S> INLINE Vector<Compute<S>> load(const S* p, int64_t n) {
  constexpr int lanes = Lanes<Compute<S>>::count;
  if (n >= lanes) return load(p);
#if defined(ADA2I_MASKS)
  return widen(masked(p, (1u << n) - 1), p);
#else
#if defined(__AVX2__)
  if constexpr (sizeof(S) == sizeof(Compute<S>)) return masked(p, first_of(n, sizeof(S)));
#endif
  S part[lanes] = {};
  copy(part, p, n);
  return load((const S*)part);
#endif
}

template <class S> INLINE void store(S* p, Vector<Compute<S>> value, int64_t n) {
  constexpr int lanes = Lanes<Compute<S>>::count;
  if (n >= lanes) return store(p, value);
#if defined(ADA2I_MASKS)
  masked(p, (1u << n) - 1, narrow(value, (const S*)p));
#else
  S part[lanes];
  store(part, value);
  copy(p, part, n);
#endif
}

// A whole vector, its place aligned, past the caches: what is read much later need not come into them before it is written, nor drive out the rest.
// streamed() afterwards: then all threads see it.
#if defined(ADA2I_MASKS)
INLINE void stream(float* p, Vector<float> value) { _mm512_stream_ps(p, (__m512)value); }
INLINE void streamed() { _mm_sfence(); }
#elif defined(__AVX2__)
INLINE void stream(float* p, Vector<float> value) { _mm256_stream_ps(p, (__m256)value); }
INLINE void streamed() { _mm_sfence(); }
#else
INLINE void stream(float* p, Vector<float> value) { store(p, value); }
INLINE void streamed() {}
#endif

// Signed bytes. GCC converts them one by one where it is not told the instructions.
#if defined(__AVX2__)
#if defined(ADA2I_MASKS)
INLINE Vector<float> from_signs(__m128i raw, float*) { return (Vector<float>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw)); }
INLINE Vector<double> from_signs(__m128i raw, double*) { return (Vector<double>)_mm512_cvtepi32_pd(_mm256_cvtepi8_epi32(raw)); }
#else
INLINE Vector<float> from_signs(__m128i raw, float*) { return (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw)); }
INLINE Vector<double> from_signs(__m128i raw, double*) { return (Vector<double>)_mm256_cvtepi32_pd(_mm_cvtepi8_epi32(raw)); }
#endif
template <class T> INLINE Vector<T> from_signs(typename Lanes<T>::signs raw) {
  __m128i bytes = {};
  __builtin_memcpy(&bytes, &raw, sizeof raw);
  return from_signs(bytes, (T*)0);
}
#else
template <class T> INLINE Vector<T> from_signs(typename Lanes<T>::signs raw) { return __builtin_convertvector(raw, Vector<T>); }
#endif

template <class T> INLINE Vector<T> load_signs(const int8_t* p, int64_t n) {
  typename Lanes<T>::signs raw = {};
  if (n >= Lanes<T>::count) {
    __builtin_memcpy(&raw, p, sizeof raw);
    return from_signs<T>(raw);
  }
#if defined(ADA2I_MASKS)
  return from_signs(_mm_maskz_loadu_epi8(__mmask16((1u << n) - 1), p), (T*)0);
#else
  for (int i = 0; i < n; ++i) raw[i] = p[i];
  return from_signs<T>(raw);
#endif
}

// -1, 0 or 1 per lane.
template <class T> INLINE void store_signs(int8_t* p, Vector<T> value, int64_t n) {
  auto raw = __builtin_convertvector((value < 0) - (value > 0), typename Lanes<T>::signs);
  if (n >= Lanes<T>::count) {
    __builtin_memcpy(p, &raw, sizeof raw);
  } else {
#if defined(ADA2I_MASKS)
    __m128i part = {};
    __builtin_memcpy(&part, &raw, sizeof raw);
    _mm_mask_storeu_epi8(p, __mmask16((1u << n) - 1), part);
#else
    for (int i = 0; i < n; ++i) p[i] = raw[i];
#endif
  }
}

template <class T> INLINE Vector<T> absolute(Vector<T> value) { return value < 0 ? -value : value; }

// ---- between the lanes --------------------------------------------------------------------------------------------------------

template <int bytes> struct LaneNumber { typedef int32_t type; };
template <> struct LaneNumber<8> { typedef int64_t type; };
template <class I, int lanes> struct ZipOrder {
  I at[lanes];
  constexpr explicit ZipOrder(int first) : at() {
    for (int i = 0; i < lanes; ++i) at[i] = first + i / 2 + i % 2 * lanes;
  }
};

// The lower halves of a and b (half = 0) or the upper ones (1), lane by lane in turn.
template <int half, class T> INLINE Vector<T> zip(Vector<T> a, Vector<T> b) {
  constexpr int lanes = Lanes<T>::count;
  typedef typename LaneNumber<sizeof(T)>::type I;
  static constexpr ZipOrder<I, lanes> order(half * lanes / 2);
#if defined(__clang__)
  Vector<T> result;
  for (int i = 0; i < lanes; ++i) result[i] = i % 2 ? b[order.at[i] - lanes] : a[order.at[i]];
  return result;
#else
  Vector<I> index;
  __builtin_memcpy(&index, order.at, sizeof index);
  return __builtin_shuffle(a, b, index);
#endif
}

// A square of vectors becomes its transpose. To zip row i with row i + lanes / 2 moves the leading bit of an element's row number to the
// end of its lane number, and the leading bit of that to the end of the row number. As often as there are bits, and both have changed places.
template <class T> INLINE void transpose_square(Vector<T>* rows) {
  constexpr int lanes = Lanes<T>::count;
#pragma GCC unroll 4
  for (int width = lanes; width > 1; width /= 2) {
    Vector<T> next[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = zip<0, T>(rows[i], rows[i + lanes / 2]);
      next[2 * i + 1] = zip<1, T>(rows[i], rows[i + lanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

// Lane i is the sum of row i: the transpose above, with what would become rows of their own added up. Overwrites the rows.
template <class T> INLINE Vector<T> row_sums(Vector<T>* rows) {
#pragma GCC unroll 4
  for (int width = Lanes<T>::count / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) rows[i] = zip<0, T>(rows[i], rows[i + width]) + zip<1, T>(rows[i], rows[i + width]);
  return rows[0];
}

#if defined(ADA2I_MASKS)
INLINE float reduce(Vector<float> value) { return _mm512_reduce_add_ps((__m512)value); }
INLINE double reduce(Vector<double> value) { return _mm512_reduce_add_pd((__m512d)value); }
template <class T> INLINE T sum(Vector<T> value) { return reduce(value); }
#else
template <class T> INLINE T sum(Vector<T> value) {
  T total[Lanes<T>::count];
  __builtin_memcpy(total, &value, sizeof value);
  for (int width = Lanes<T>::count / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) total[i] += total[i + width];
  return total[0];
}
#endif

// ---- functions ----------------------------------------------------------------------------------------------------------------

INLINE Vector<float> square_root(Vector<float> value) {
#if defined(ADA2I_MASKS)
  return (Vector<float>)_mm512_sqrt_ps((__m512)value);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_sqrt_ps((__m256)value);
#elif defined(__SSE2__)
  return (Vector<float>)_mm_sqrt_ps((__m128)value);
#else
  for (int i = 0; i < Lanes<float>::count; ++i) value[i] = __builtin_sqrtf(value[i]);
  return value;
#endif
}

// Natural logarithm of a positive normal number: x = 2^e m with m in [sqrt(1/2), sqrt(2)), then a polynomial of m - 1
// (Moshier, Cephes logf); error below 1e-7 relative to max(1, |log x|).
INLINE Vector<float> logarithm(Vector<float> x) {
  auto bits = (Vector<int32_t>)x - 0x3f3504f3;
  auto exponent = __builtin_convertvector(bits >> 23, Vector<float>);
  auto m = (Vector<float>)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  auto p = broadcast(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  auto square = m * m;
  return exponent * 0.693147180559945f + (m + square * (p * m - 0.5f));
}

// exp(x) for x <= 88; below -87 the result stays at exp(-87), 1e-38. Error below 2 ulp (Moshier, Cephes expf).
INLINE Vector<float> exponential(Vector<float> x) {
  x = x < -87.0f ? broadcast(-87.0f) : x;                                    // a NaN stays one
  auto n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;           // to the nearest integer
  auto r = x - n * 0.693359375f - n * -2.12194440e-4f;
  auto p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Vector<float>)((__builtin_convertvector(n, Vector<int32_t>) + 127) << 23);
}

INLINE Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
INLINE Vector<double> logarithm(Vector<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = __builtin_log(x[i]);
  return x;
}
INLINE Vector<double> square_root(Vector<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
