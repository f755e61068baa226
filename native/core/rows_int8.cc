// Int8 kernels whose lanes are output channels: NHWC in, NHWC out. A block is 16 or 4 outputs x 4 inputs, what one
// dot-product instruction takes; activations are int8 (requantized in float, as XNNPACK does) or float, quantized on arrival.
#include "rows.h"

namespace paring {
namespace PARING_TARGET {
namespace {

// Sums have vector types of 32-bit integers, not __m512i: where types differ between loop and exit, GCC keeps two copies of
// each and runs out of registers.
// A policy says how R outputs x 4 inputs meet an activation: `vectors` sums of them, `halves` products of a block.
#if WIDE
struct Dot16 {
  using A = __v16si; using X = __m512i; using W = __m512i;
  static constexpr int outputs = 16, vectors = 1;
  PARING_INLINE A load(const int32_t* p) { return A(_mm512_loadu_si512(p)); }
  PARING_INLINE A zero() { return A(_mm512_setzero_si512()); }
  PARING_INLINE A add(A a, A b) { return A(_mm512_add_epi32(__m512i(a), __m512i(b))); }
  PARING_INLINE A times(A a, int32_t b) { return A(_mm512_mullo_epi32(__m512i(a), _mm512_set1_epi32(b))); }
  PARING_INLINE X activation(const char* p) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(p)); }
#if defined(__AVX512VNNI__)
  static constexpr int halves = 1;
  PARING_INLINE W weights(const int8_t* v, int, int) { return _mm512_loadu_si512(v); }
  PARING_INLINE A dot(A a, X x, W w) { return A(_mm512_dpbusd_epi32(__m512i(a), x, w)); }
#else
  static constexpr int halves = 2;
  PARING_INLINE W weights(const int8_t* v, int half, int) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + 32 * half))); }
  PARING_INLINE A dot(A a, X x, W w) { return A(_mm512_add_epi32(__m512i(a), _mm512_madd_epi16(x, w))); }
#endif
  PARING_INLINE void scaled(const A* a, const float* scale, float inverse, const float* bias, float low, float high, float* y, int left) {
    __m512 r = _mm512_mul_ps(_mm512_cvtepi32_ps(__m512i(a[0])), _mm512_set1_ps(inverse));
    r = _mm512_fmadd_ps(r, _mm512_loadu_ps(scale), _mm512_loadu_ps(bias));
    r = _mm512_min_ps(_mm512_max_ps(r, _mm512_set1_ps(low)), _mm512_set1_ps(high));
    if (left >= 16) _mm512_storeu_ps(y, r);
    else _mm512_mask_storeu_ps(y, __mmask16((1u << left) - 1), r);
  }
  PARING_INLINE __m512i requantized(A a, __m512 scale, const Packed& w) {
    __m512 r = _mm512_mul_ps(_mm512_cvtepi32_ps(__m512i(a)), scale);
    if (!w.small) r = _mm512_min_ps(r, _mm512_set1_ps(float(w.greatest - w.zero)));
    return _mm512_cvtps_epi32(r);
  }
  PARING_INLINE void requantize(const A* a, const float* scale, const Packed& w, int8_t* y, int left) {
    __m512i r = _mm512_add_epi32(requantized(a[0], _mm512_loadu_ps(scale), w), _mm512_set1_epi32(w.zero));
    r = _mm512_min_epi32(_mm512_max_epi32(r, _mm512_set1_epi32(w.least)), _mm512_set1_epi32(w.greatest));
    _mm512_mask_cvtsepi32_storeu_epi8(y, left >= 16 ? 0xffff : __mmask16((1u << left) - 1), r);
  }
};
#endif
#if defined(__AVX2__)
struct Dot16Pair {   // 16 outputs in two registers of 8
  using A = __v8si; using X = __m256i; using W = __m256i;
  static constexpr int outputs = 16, vectors = 2;
  PARING_INLINE A load(const int32_t* p) { return A(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  PARING_INLINE A zero() { return A(_mm256_setzero_si256()); }
  PARING_INLINE A add(A a, A b) { return A(_mm256_add_epi32(__m256i(a), __m256i(b))); }
  PARING_INLINE A times(A a, int32_t b) { return A(_mm256_mullo_epi32(__m256i(a), _mm256_set1_epi32(b))); }
  PARING_INLINE X activation(const char* p) { return _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(p)); }
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
  static constexpr int halves = 1;
  PARING_INLINE W weights(const int8_t* v, int, int n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + 32 * n)); }
  PARING_INLINE A dot(A a, X x, W w) {
#if defined(__AVXVNNI__)
    return A(_mm256_dpbusd_avx_epi32(__m256i(a), x, w));
#else
    return A(_mm256_dpbusd_epi32(__m256i(a), x, w));
#endif
  }
#else
  static constexpr int halves = 2;
  PARING_INLINE W weights(const int8_t* v, int half, int n) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v + 32 * half + 16 * n))); }
  PARING_INLINE A dot(A a, X x, W w) { return A(_mm256_add_epi32(__m256i(a), _mm256_madd_epi16(x, w))); }
#endif
  PARING_INLINE void scaled(const A* a, const float* scale, float inverse, const float* bias, float low, float high, float* y, int left) {
    for (int n = 0; n < 2; n++) {
      __m256 r = _mm256_mul_ps(_mm256_cvtepi32_ps(__m256i(a[n])), _mm256_set1_ps(inverse));
      r = _mm256_fmadd_ps(r, _mm256_loadu_ps(scale + 8 * n), _mm256_loadu_ps(bias + 8 * n));
      r = _mm256_min_ps(_mm256_max_ps(r, _mm256_set1_ps(low)), _mm256_set1_ps(high));
      int here = left - 8 * n;
      if (here >= 8) _mm256_storeu_ps(y + 8 * n, r);
      else if (here > 0) store_first<Eight>(y + 8 * n, here, r);
    }
  }
  PARING_INLINE void requantize(const A* a, const float* scale, const Packed& w, int8_t* y, int left) {
    __m256i q[2];
    for (int n = 0; n < 2; n++) {
      __m256 r = _mm256_mul_ps(_mm256_cvtepi32_ps(__m256i(a[n])), _mm256_loadu_ps(scale + 8 * n));
      q[n] = _mm256_cvtps_epi32(_mm256_min_ps(r, _mm256_set1_ps(float(w.greatest - w.zero))));
    }
    __m256i h = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
    h = _mm256_adds_epi16(h, _mm256_set1_epi16(int16_t(w.zero)));
    __m128i b = _mm_packs_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    b = _mm_min_epi8(_mm_max_epi8(b, _mm_set1_epi8(char(w.least))), _mm_set1_epi8(char(w.greatest)));
    if (left >= 16) { _mm_storeu_si128(reinterpret_cast<__m128i*>(y), b); return; }
    int8_t part[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(part), b);
    for (int i = 0; i < left; i++) y[i] = part[i];
  }
};
struct Dot4 {
  using A = __v4si; using X = __m128i; using W = __m128i;
  static constexpr int outputs = 4, vectors = 1;
  PARING_INLINE A load(const int32_t* p) { return A(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  PARING_INLINE A zero() { return A(_mm_setzero_si128()); }
  PARING_INLINE A add(A a, A b) { return A(_mm_add_epi32(__m128i(a), __m128i(b))); }
  PARING_INLINE A times(A a, int32_t b) { return A(_mm_mullo_epi32(__m128i(a), _mm_set1_epi32(b))); }
  PARING_INLINE X activation(const char* p) { return _mm_set1_epi32(*reinterpret_cast<const int32_t*>(p)); }
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
  static constexpr int halves = 1;
  PARING_INLINE W weights(const int8_t* v, int, int) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(v)); }
  PARING_INLINE A dot(A a, X x, W w) {
#if defined(__AVXVNNI__)
    return A(_mm_dpbusd_avx_epi32(__m128i(a), x, w));
#else
    return A(_mm_dpbusd_epi32(__m128i(a), x, w));
#endif
  }
#else
  static constexpr int halves = 2;
  PARING_INLINE W weights(const int8_t* v, int half, int) { return _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(v + 8 * half))); }
  PARING_INLINE A dot(A a, X x, W w) { return A(_mm_add_epi32(__m128i(a), _mm_madd_epi16(x, w))); }
#endif
  PARING_INLINE void scaled(const A* a, const float* scale, float inverse, const float* bias, float low, float high, float* y, int left) {
    __m128 r = _mm_mul_ps(_mm_cvtepi32_ps(__m128i(a[0])), _mm_set1_ps(inverse));
    r = _mm_fmadd_ps(r, _mm_loadu_ps(scale), _mm_loadu_ps(bias));
    r = _mm_min_ps(_mm_max_ps(r, _mm_set1_ps(low)), _mm_set1_ps(high));
    if (left >= 4) _mm_storeu_ps(y, r); else store_first<Four>(y, left, r);
  }
  PARING_INLINE void requantize(const A* a, const float* scale, const Packed& w, int8_t* y, int left) {
    __m128 r = _mm_mul_ps(_mm_cvtepi32_ps(__m128i(a[0])), _mm_loadu_ps(scale));
    __m128i q = _mm_cvtps_epi32(_mm_min_ps(r, _mm_set1_ps(float(w.greatest - w.zero))));
    q = _mm_adds_epi16(_mm_packs_epi32(q, q), _mm_set1_epi16(int16_t(w.zero)));
    q = _mm_packs_epi16(q, q);
    q = _mm_min_epi8(_mm_max_epi8(q, _mm_set1_epi8(char(w.least))), _mm_set1_epi8(char(w.greatest)));
    int32_t four = _mm_cvtsi128_si32(q);
    if (left >= 4) { *reinterpret_cast<int32_t __attribute__((aligned(1), may_alias))*>(y) = four; return; }
    for (int i = 0; i < left; i++) y[i] = int8_t(four >> 8 * i);
  }
};
#else
template <int R> struct DotPlain {
  struct A { int32_t at[R]; };
  struct X { int16_t at[2]; };
  struct W { int16_t at[R][2]; };
  static constexpr int outputs = R, vectors = 1, halves = 2;
  PARING_INLINE A load(const int32_t* p) { A a; for (int i = 0; i < R; i++) a.at[i] = p[i]; return a; }
  PARING_INLINE A zero() { return A{}; }
  PARING_INLINE A add(A a, A b) { for (int i = 0; i < R; i++) a.at[i] += b.at[i]; return a; }
  PARING_INLINE A times(A a, int32_t b) { for (int i = 0; i < R; i++) a.at[i] *= b; return a; }
  PARING_INLINE X activation(const char* p) { X x; __builtin_memcpy(&x, p, 4); return x; }
  PARING_INLINE W weights(const int8_t* v, int half, int) { W w; for (int i = 0; i < R * 2; i++) w.at[i / 2][i % 2] = v[R * 2 * half + i]; return w; }
  PARING_INLINE A dot(A a, X x, W w) { for (int i = 0; i < R; i++) a.at[i] += x.at[0] * w.at[i][0] + x.at[1] * w.at[i][1]; return a; }
  PARING_INLINE void scaled(const A* a, const float* scale, float inverse, const float* bias, float low, float high, float* y, int left) {
    for (int i = 0; i < R && i < left; i++) {
      float r = __builtin_fmaf(float(a->at[i]) * inverse, scale[i], bias[i]);
      y[i] = r < low ? low : r > high ? high : r;
    }
  }
  PARING_INLINE void requantize(const A* a, const float* scale, const Packed& w, int8_t* y, int left) {
    for (int i = 0; i < R && i < left; i++) {
      float r = float(a->at[i]) * scale[i], top = float(w.greatest - w.zero), bottom = float(w.least - w.zero);
      r = r < top ? r : top;
      r = r > bottom ? r : bottom;
      y[i] = int8_t(int32_t(__builtin_rintf(r)) + w.zero);
    }
  }
};
#endif

template <class D, int L, int C, class E, bool dynamic> void int8_tile(const Tile& t) {
  constexpr int P = L * C, N = D::vectors, R = D::outputs, U = P * N >= 8 ? 1 : P * N >= 4 ? 2 : P * N >= 2 ? 4 : 8, H = D::halves;
  using A = typename D::A;
  const Packed& w = *t.w;
  constexpr int32_t shift = H == 1 ? 128 : 0;     // of the activations, as `widen` stores them
  for (int g = t.first; g < t.last; g++) {
    const E *e = static_cast<const E*>(t.entry) + w.start[g], *end = static_cast<const E*>(t.entry) + w.start[g + 1];
    const int8_t* v = static_cast<const int8_t*>(w.value) + size_t(w.start[g]) * R * 4;
    A a[U][P][N];
    UNROLL for (int p = 0; p < P; p++)
      UNROLL for (int n = 0; n < N; n++) {
        if (dynamic) a[0][p][n] = D::times(D::load(w.sum + g * R + n * (R / N)), -(t.zero[(p / C) * t.quant_line + p % C] + shift));
        else a[0][p][n] = D::load(static_cast<const int32_t*>(w.bias) + g * R + n * (R / N));
        UNROLL for (int u = 1; u < U; u++) a[u][p][n] = D::zero();
      }
    auto block = [&](int u, const E* e, const int8_t* v) __attribute__((always_inline)) {
      const char* x = t.x + bytes_of(*e, 4 * H);
      UNROLL for (int h = 0; h < H; h++) {
        decltype(D::weights(v, h, 0)) b[N];
        UNROLL for (int n = 0; n < N; n++) b[n] = D::weights(v, h, n);
        UNROLL for (int p = 0; p < P; p++) {
          typename D::X c = D::activation(x + (p / C) * t.line + (p % C) * t.step + 4 * h);
          UNROLL for (int n = 0; n < N; n++) a[u][p][n] = D::dot(a[u][p][n], c, b[n]);
        }
      }
    };
    if (U > 1) for (; e + U <= end; e += U, v += U * R * 4) {
      if (P <= 2) fetch<U * R * 4>(v);
      UNROLL for (int u = 0; u < U; u++) block(u, e + u, v + u * R * 4);
    }
    for (; e < end; e++, v += R * 4) block(0, e, v);
    UNROLL for (int u = 1; u < U; u++)
      UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int n = 0; n < N; n++) a[0][p][n] = D::add(a[0][p][n], a[u][p][n]);
    int left = w.outputs - g * R;
    const float* scale = w.scale + g * R;
    auto at = [&](int p) __attribute__((always_inline)) { return t.y + (p / C) * t.y_line + (p % C) * t.y_step; };
    if (dynamic) {
      UNROLL for (int p = 0; p < P; p++) {
        ptrdiff_t q = (p / C) * t.quant_line + p % C;
        D::scaled(a[0][p], scale, t.inverse[q], static_cast<const float*>(w.bias) + g * R, w.low, w.high, reinterpret_cast<float*>(at(p)) + g * R, left);
      }
      continue;
    }
#if WIDE
    // Four pixels of 16 outputs are one register of bytes: a quarter of the packing.
    if constexpr (R == 16) if (left >= 16) {
      const __m512 s = _mm512_loadu_ps(scale);
      const __m512i zero = _mm512_set1_epi16(int16_t(w.zero)), low = _mm512_set1_epi8(char(w.least)), high = _mm512_set1_epi8(char(w.greatest));
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      UNROLL for (int p = 0; p + 4 <= P; p += 4) {
        __m512i q[4];
        UNROLL for (int i = 0; i < 4; i++) q[i] = D::requantized(a[0][p + i][0], s, w);
        __m512i b = _mm512_packs_epi16(_mm512_adds_epi16(_mm512_packs_epi32(q[0], q[1]), zero), _mm512_adds_epi16(_mm512_packs_epi32(q[2], q[3]), zero));
        b = _mm512_permutexvar_epi32(order, _mm512_min_epi8(_mm512_max_epi8(b, low), high));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at(p) + g * R), _mm512_castsi512_si128(b));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at(p + 1) + g * R), _mm512_extracti32x4_epi32(b, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at(p + 2) + g * R), _mm512_extracti32x4_epi32(b, 2));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at(p + 3) + g * R), _mm512_extracti32x4_epi32(b, 3));
      }
      UNROLL for (int p = P / 4 * 4; p < P; p++) D::requantize(a[0][p], scale, w, reinterpret_cast<int8_t*>(at(p)) + g * R, left);
      continue;
    }
#endif
    UNROLL for (int p = 0; p < P; p++) D::requantize(a[0][p], scale, w, reinterpret_cast<int8_t*>(at(p)) + g * R, left);
  }
}

// Signed bytes to what the products read: u8 = s8 + 128 for vpdpbusd, else 16 bits. Inputs beyond n are 0 in weights.
template <int H> void widen(const int8_t* x, int n, void* out) {
  if (H == 1) {
    uint8_t* y = static_cast<uint8_t*>(out);
    int i = 0;
#if defined(__AVX2__)
    for (; i + 32 <= n; i += 32)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)), _mm256_set1_epi8(-128)));
#endif
    for (; i < n; i++) y[i] = uint8_t(x[i]) ^ 128;
    for (; i % 4; i++) y[i] = 0;
  } else {
    int16_t* y = static_cast<int16_t*>(out);
    int i = 0;
    for (; i < n; i++) y[i] = x[i];
    for (; i % 4; i++) y[i] = 0;
  }
}

// XNNPACK's dynamic quantization of a row: asymmetric over [min(0, least), max(0, greatest)], the zero point nudged to
// the nearer end.
template <int H> void quantize(const float* x, int64_t n, void* out, float* inverse, int32_t* zero_point) {
  F lo = all(0), hi = all(0);
  int64_t i = 0;
  for (; i + width <= n; i += width) { F a = load(x + i); lo = least(lo, a); hi = most(hi, a); }
  if (i < n) { F a = load_part(x + i, int(n - i)); lo = least(lo, a); hi = most(hi, a); }
  float low[width], high[width], least_value = 0, most_value = 0;
  store(low, lo);
  store(high, hi);
  for (int k = 0; k < width; k++) {
    least_value = low[k] < least_value ? low[k] : least_value;
    most_value = high[k] > most_value ? high[k] : most_value;
  }
  float scale = least_value == most_value ? 1.f : 255.f / (most_value - least_value), a = least_value * scale, b = most_value * scale;
  float z = (-128 + a) + (127 + b) > 0 ? -128 - a : 127 - b;
  z = z < -128 ? -128 : z > 127 ? 127 : z;
  int32_t zero = int32_t(__builtin_rintf(z));
  *inverse = 1.f / scale;
  *zero_point = zero;
  i = 0;
#if WIDE
  for (; i < n; i += 16) {
    __mmask16 m = n - i >= 16 ? 0xffff : __mmask16((1u << (n - i)) - 1);
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), _mm512_set1_ps(scale)));
    q = _mm512_add_epi32(q, _mm512_set1_epi32(zero));
    q = _mm512_min_epi32(_mm512_max_epi32(q, _mm512_set1_epi32(-128)), _mm512_set1_epi32(127));
    if (H == 1) _mm512_mask_cvtepi32_storeu_epi8(static_cast<uint8_t*>(out) + i, m, _mm512_xor_si512(q, _mm512_set1_epi32(128)));
    else _mm512_mask_cvtepi32_storeu_epi16(static_cast<int16_t*>(out) + i, m, q);
  }
  i = n;
#elif defined(__AVX2__)
  for (; i + 8 <= n; i += 8) {
    __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(scale)));
    q = _mm256_add_epi32(q, _mm256_set1_epi32(zero));
    q = _mm256_min_epi32(_mm256_max_epi32(q, _mm256_set1_epi32(-128)), _mm256_set1_epi32(127));
    __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    if (H == 2) _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<int16_t*>(out) + i), h);
    else _mm_storel_epi64(reinterpret_cast<__m128i*>(static_cast<uint8_t*>(out) + i), _mm_xor_si128(_mm_packs_epi16(h, h), _mm_set1_epi8(-128)));
  }
#endif
  for (; i < n; i++) {
    float r = __builtin_rintf(x[i] * scale) + float(zero);
    int32_t q = r < -128 ? -128 : r > 127 ? 127 : int32_t(r);
    if (H == 1) static_cast<uint8_t*>(out)[i] = uint8_t(q + 128);
    else static_cast<int16_t*>(out)[i] = int16_t(q);
  }
  for (; i % 4; i++) { if (H == 1) static_cast<uint8_t*>(out)[i] = 0; else static_cast<int16_t*>(out)[i] = 0; }
}

#if WIDE
using D16 = Dot16; using D4 = Dot4;
#elif defined(__AVX2__)
using D16 = Dot16Pair; using D4 = Dot4;
#else
using D16 = DotPlain<16>; using D4 = DotPlain<4>;
#endif
#if defined(__AVX2__)
constexpr int P16 = pixels_for(D16::vectors, most_columns), P4 = pixels_for(1, 12);
#else
constexpr int P16 = 2, P4 = 4;
#endif
constexpr int H = D16::halves;
constexpr Order order = H == 1 ? Order::dot4 : Order::dot2;

template <int L, int C, class E> struct MakeS16 { static constexpr TileFn tile = int8_tile<D16, L, C, E, false>; };
template <int L, int C, class E> struct MakeS4 { static constexpr TileFn tile = int8_tile<D4, L, C, E, false>; };
template <int L, int C, class E> struct MakeQ16 { static constexpr TileFn tile = int8_tile<D16, L, C, E, true>; };
template <int L, int C, class E> struct MakeQ4 { static constexpr TileFn tile = int8_tile<D4, L, C, E, true>; };
constexpr Table s8_16 = tiles<MakeS16, P16>(), s8_4 = tiles<MakeS4, P4>(), qd8_16 = tiles<MakeQ16, P16>(), qd8_4 = tiles<MakeQ4, P4>();

constexpr Kernel table[] = {
    {NAME("s8-16x4", PARING_TARGET), this_isa, PARING_S8, 16, 4, order, 4 * H, P16, s8_16.at, widen<H>, nullptr},
    {NAME("s8-4x4", PARING_TARGET), this_isa, PARING_S8, 4, 4, order, 4 * H, P4, s8_4.at, widen<H>, nullptr},
    {NAME("qd8-16x4", PARING_TARGET), this_isa, PARING_QD8, 16, 4, order, 4 * H, P16, qd8_16.at, widen<H>, quantize<H>},
    {NAME("qd8-4x4", PARING_TARGET), this_isa, PARING_QD8, 4, 4, order, 4 * H, P4, qd8_4.at, widen<H>, quantize<H>},
};

}  // namespace

KernelList rows_int8() { return {table, int(sizeof table / sizeof *table)}; }

}  // namespace PARING_TARGET
}  // namespace paring
