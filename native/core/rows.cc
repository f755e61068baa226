// Kernels whose lanes are output channels: NHWC in, NHWC out, no layout change. A block of R outputs x 1 input (float32)
// or R x 4 inputs (int8) is one or two vectors of weights, fed to all pixels of a tile by broadcasting their activations.
// Compiled once per target: see simd.h.
#include "kernels.h"
#include "simd.h"

namespace paring {
namespace PARING_TARGET {
namespace {

#define UNROLL _Pragma("GCC unroll 32")

#if defined(__AVX512F__) && !defined(PARING_NARROW)
#define WIDE 1
constexpr int registers = 32;
#else
#define WIDE 0
constexpr int registers = 16;
#endif

// ---- float32 ---------------------------------------------------------------------------------------------------------

#if defined(__AVX2__)
struct Four {
  using V = __m128;
  static constexpr int lanes = 4;
  PARING_INLINE V load(const float* p) { return _mm_loadu_ps(p); }
  PARING_INLINE void store(float* p, V a) { _mm_storeu_ps(p, a); }
  PARING_INLINE V all(float a) { return _mm_set1_ps(a); }
  PARING_INLINE V madd(V a, V b, V c) { return _mm_fmadd_ps(a, b, c); }
  PARING_INLINE V add(V a, V b) { return _mm_add_ps(a, b); }
  PARING_INLINE V least(V a, V b) { return _mm_min_ps(a, b); }
  PARING_INLINE V most(V a, V b) { return _mm_max_ps(a, b); }
};
struct Eight {
  using V = __m256;
  static constexpr int lanes = 8;
  PARING_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  PARING_INLINE void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  PARING_INLINE V all(float a) { return _mm256_set1_ps(a); }
  PARING_INLINE V madd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  PARING_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
  PARING_INLINE V least(V a, V b) { return _mm256_min_ps(a, b); }
  PARING_INLINE V most(V a, V b) { return _mm256_max_ps(a, b); }
};
#endif
struct Native {
  using V = F;
  static constexpr int lanes = width;
  PARING_INLINE V load(const float* p) { return PARING_TARGET::load(p); }
  PARING_INLINE void store(float* p, V a) { PARING_TARGET::store(p, a); }
  PARING_INLINE V all(float a) { return PARING_TARGET::all(a); }
  PARING_INLINE V madd(V a, V b, V c) { return PARING_TARGET::madd(a, b, c); }
  PARING_INLINE V add(V a, V b) { return PARING_TARGET::add(a, b); }
  PARING_INLINE V least(V a, V b) { return PARING_TARGET::least(a, b); }
  PARING_INLINE V most(V a, V b) { return PARING_TARGET::most(a, b); }
};

template <class S> PARING_INLINE void store_first(float* p, int n, typename S::V a) {
  float part[S::lanes];
  S::store(part, a);
  for (int i = 0; i < n; i++) p[i] = part[i];
}
template <class S> PARING_INLINE typename S::V load_first(const float* p, int n) {
  float part[S::lanes] = {};
  for (int i = 0; i < n; i++) part[i] = p[i];
  return S::load(part);
}

// Where an entry points, in bytes from the pixel.
PARING_INLINE ptrdiff_t bytes_of(uint16_t entry, int unit) { return ptrdiff_t(entry) * unit; }
PARING_INLINE ptrdiff_t bytes_of(int32_t entry, int) { return entry; }

// N vectors are the R outputs of a block. Few pixels leave too few sums in flight to hide the latency of an FMA (4 or 5
// cycles, up to two a cycle): then several blocks are summed apart, `U` of them.
template <class S, int N, int L, int C, class E> void f32_tile(const Tile& t) {
  using V = typename S::V;
  constexpr int P = L * C, R = N * S::lanes, U = P * N >= 8 ? 1 : P * N >= 4 ? 2 : P * N >= 2 ? 4 : 8;
  const Packed& w = *t.w;
  const float* bias = static_cast<const float*>(w.bias);
  for (int pass = 0; pass < w.passes; pass++)
    for (int g = t.first; g < t.last; g++) {
      const uint32_t* s = w.start + size_t(pass) * w.groups + g;
      const E *e = static_cast<const E*>(t.entry) + s[0], *end = static_cast<const E*>(t.entry) + s[1];
      const float* v = static_cast<const float*>(w.value) + size_t(s[0]) * R;
      int left = w.outputs - g * R;
      V a[U][P][N];
      UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int n = 0; n < N; n++) {
          const float* y = reinterpret_cast<const float*>(t.y + (p / C) * t.y_line + (p % C) * t.y_step) + g * R + n * S::lanes;
          int here = left - n * S::lanes;
          if (!pass) a[0][p][n] = S::load(bias + g * R + n * S::lanes);
          else if (here >= S::lanes) a[0][p][n] = S::load(y);
          else a[0][p][n] = load_first<S>(y, here > 0 ? here : 0);
          UNROLL for (int u = 1; u < U; u++) a[u][p][n] = S::all(0);
        }
      auto block = [&](int u, const E* e, const float* v) __attribute__((always_inline)) {
        V b[N];
        UNROLL for (int n = 0; n < N; n++) b[n] = S::load(v + n * S::lanes);
        const char* x = t.x + bytes_of(*e, 4);
        UNROLL for (int p = 0; p < P; p++) {
          V c = S::all(*reinterpret_cast<const float*>(x + (p / C) * t.line + (p % C) * t.step));
          UNROLL for (int n = 0; n < N; n++) a[u][p][n] = S::madd(c, b[n], a[u][p][n]);
        }
      };
      if (U > 1) for (; e + U <= end; e += U, v += U * R)
        UNROLL for (int u = 0; u < U; u++) block(u, e + u, v + u * R);
      for (; e < end; e++, v += R) block(0, e, v);
      bool last = pass == w.passes - 1;
      UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int n = 0; n < N; n++) {
          V r = a[0][p][n];
          UNROLL for (int u = 1; u < U; u++) r = S::add(r, a[u][p][n]);
          if (last) r = S::least(S::most(r, S::all(w.low)), S::all(w.high));
          float* y = reinterpret_cast<float*>(t.y + (p / C) * t.y_line + (p % C) * t.y_step) + g * R + n * S::lanes;
          int here = left - n * S::lanes;
          if (here >= S::lanes) S::store(y, r);
          else if (here > 0) store_first<S>(y, here, r);
        }
    }
}

// Unstructured weights, few pixels (what counts then is bytes): for each input one mask of the R outputs that have a weight,
// and these weights packed; the vector is put together again on the way. An index costs a bit per weight, zero or not.
#if WIDE
constexpr int bitmap_lanes = 16;
using Mask = uint16_t;
using B = Native;
PARING_INLINE F spread(Mask m, const float* v) { return _mm512_maskz_expandloadu_ps(m, v); }
#elif defined(__AVX2__)
constexpr int bitmap_lanes = 8;
using Mask = uint8_t;
using B = Native;
// Lane i of entry m: how many bits of m lie below bit i; the top bit where bit i itself is not set.
struct Spread { int32_t at[256][8]; };
constexpr Spread make_spread() {
  Spread s = {};
  for (int m = 0; m < 256; m++)
    for (int i = 0, n = 0; i < 8; i++) { s.at[m][i] = m >> i & 1 ? n : int32_t(0x80000000u); n += m >> i & 1; }
  return s;
}
constexpr Spread spreads = make_spread();
PARING_INLINE F spread(Mask m, const float* v) {
  __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(spreads.at[m]));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(v), at), _mm256_setzero_ps(), _mm256_castsi256_ps(at));
}
#else
constexpr int bitmap_lanes = 4;
using Mask = uint8_t;
using B = Native;
PARING_INLINE F spread(Mask m, const float* v) {
  F a = {0, 0, 0, 0};
  for (int i = 0; i < 4; i++) if (m >> i & 1) a[i] = *v++;
  return a;
}
#endif

template <int L, int C> void bitmap_tile(const Tile& t) {
  constexpr int P = L * C, R = bitmap_lanes, U = P == 1 ? 4 : 2;
  const Packed& w = *t.w;
  const float* bias = static_cast<const float*>(w.bias);
  int inputs = int(w.start[w.groups + 1]);           // behind the ranges: masks of a group
  for (int g = t.first; g < t.last; g++) {
    const Mask* m = static_cast<const Mask*>(t.entry) + size_t(g) * inputs;
    const float* v = static_cast<const float*>(w.value) + w.start[g];
    F a[U][P];
    UNROLL for (int p = 0; p < P; p++) { a[0][p] = load(bias + g * R); UNROLL for (int u = 1; u < U; u++) a[u][p] = all(0); }
    auto step = [&](int u, int i) __attribute__((always_inline)) {
      F b = spread(m[i], v);
      v += __builtin_popcount(m[i]);
      UNROLL for (int p = 0; p < P; p++) a[u][p] = madd(all(reinterpret_cast<const float*>(t.x + p * t.step)[i]), b, a[u][p]);
    };
    int i = 0;
    for (; i + U <= inputs; i += U) UNROLL for (int u = 0; u < U; u++) step(u, i + u);
    for (; i < inputs; i++) step(0, i);
    int left = w.outputs - g * R;
    UNROLL for (int p = 0; p < P; p++) {
      F r = a[0][p];
      UNROLL for (int u = 1; u < U; u++) r = add(r, a[u][p]);
      r = least(most(r, all(w.low)), all(w.high));
      float* y = reinterpret_cast<float*>(t.y + p * t.y_step) + g * R;
      if (left >= R) store(y, r); else store_first<Native>(y, left, r);
    }
  }
}

// ---- int8 ------------------------------------------------------------------------------------------------------------

// A policy says how R outputs x 4 inputs meet an activation: `vectors` sums of them, `halves` products of a block.
#if WIDE
struct Dot16 {
  using A = __m512i; using X = __m512i;
  static constexpr int outputs = 16, vectors = 1;
  PARING_INLINE A load(const int32_t* p) { return _mm512_loadu_si512(p); }
  PARING_INLINE A zero() { return _mm512_setzero_si512(); }
  PARING_INLINE A add(A a, A b) { return _mm512_add_epi32(a, b); }
  PARING_INLINE A times(A a, int32_t b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(b)); }
  PARING_INLINE X activation(const char* p) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(p)); }
#if defined(__AVX512VNNI__)
  static constexpr int halves = 1;
  PARING_INLINE A weights(const int8_t* v, int, int) { return _mm512_loadu_si512(v); }
  PARING_INLINE A dot(A a, X x, A w) { return _mm512_dpbusd_epi32(a, x, w); }
#else
  static constexpr int halves = 2;
  PARING_INLINE A weights(const int8_t* v, int half, int) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + 32 * half))); }
  PARING_INLINE A dot(A a, X x, A w) { return _mm512_add_epi32(a, _mm512_madd_epi16(x, w)); }
#endif
  PARING_INLINE void scaled(const A* a, const float* scale, float inverse, const float* bias, float low, float high, float* y, int left) {
    __m512 r = _mm512_mul_ps(_mm512_cvtepi32_ps(a[0]), _mm512_set1_ps(inverse));
    r = _mm512_fmadd_ps(r, _mm512_loadu_ps(scale), _mm512_loadu_ps(bias));
    r = _mm512_min_ps(_mm512_max_ps(r, _mm512_set1_ps(low)), _mm512_set1_ps(high));
    if (left >= 16) _mm512_storeu_ps(y, r);
    else _mm512_mask_storeu_ps(y, __mmask16((1u << left) - 1), r);
  }
  PARING_INLINE __m512i requantized(A a, __m512 scale, const Packed& w) {
    __m512 r = _mm512_mul_ps(_mm512_cvtepi32_ps(a), scale);
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
  using A = __m256i; using X = __m256i;
  static constexpr int outputs = 16, vectors = 2;
  PARING_INLINE A load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  PARING_INLINE A zero() { return _mm256_setzero_si256(); }
  PARING_INLINE A add(A a, A b) { return _mm256_add_epi32(a, b); }
  PARING_INLINE A times(A a, int32_t b) { return _mm256_mullo_epi32(a, _mm256_set1_epi32(b)); }
  PARING_INLINE X activation(const char* p) { return _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(p)); }
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
  static constexpr int halves = 1;
  PARING_INLINE A weights(const int8_t* v, int, int n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + 32 * n)); }
  PARING_INLINE A dot(A a, X x, A w) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(a, x, w);
#else
    return _mm256_dpbusd_epi32(a, x, w);
#endif
  }
#else
  static constexpr int halves = 2;
  PARING_INLINE A weights(const int8_t* v, int half, int n) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v + 32 * half + 16 * n))); }
  PARING_INLINE A dot(A a, X x, A w) { return _mm256_add_epi32(a, _mm256_madd_epi16(x, w)); }
#endif
  PARING_INLINE void scaled(const A* a, const float* scale, float inverse, const float* bias, float low, float high, float* y, int left) {
    for (int n = 0; n < 2; n++) {
      __m256 r = _mm256_mul_ps(_mm256_cvtepi32_ps(a[n]), _mm256_set1_ps(inverse));
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
      __m256 r = _mm256_mul_ps(_mm256_cvtepi32_ps(a[n]), _mm256_loadu_ps(scale + 8 * n));
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
  using A = __m128i; using X = __m128i;
  static constexpr int outputs = 4, vectors = 1;
  PARING_INLINE A load(const int32_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  PARING_INLINE A zero() { return _mm_setzero_si128(); }
  PARING_INLINE A add(A a, A b) { return _mm_add_epi32(a, b); }
  PARING_INLINE A times(A a, int32_t b) { return _mm_mullo_epi32(a, _mm_set1_epi32(b)); }
  PARING_INLINE X activation(const char* p) { return _mm_set1_epi32(*reinterpret_cast<const int32_t*>(p)); }
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
  static constexpr int halves = 1;
  PARING_INLINE A weights(const int8_t* v, int, int) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(v)); }
  PARING_INLINE A dot(A a, X x, A w) {
#if defined(__AVXVNNI__)
    return _mm_dpbusd_avx_epi32(a, x, w);
#else
    return _mm_dpbusd_epi32(a, x, w);
#endif
  }
#else
  static constexpr int halves = 2;
  PARING_INLINE A weights(const int8_t* v, int half, int) { return _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(v + 8 * half))); }
  PARING_INLINE A dot(A a, X x, A w) { return _mm_add_epi32(a, _mm_madd_epi16(x, w)); }
#endif
  PARING_INLINE void scaled(const A* a, const float* scale, float inverse, const float* bias, float low, float high, float* y, int left) {
    __m128 r = _mm_mul_ps(_mm_cvtepi32_ps(a[0]), _mm_set1_ps(inverse));
    r = _mm_fmadd_ps(r, _mm_loadu_ps(scale), _mm_loadu_ps(bias));
    r = _mm_min_ps(_mm_max_ps(r, _mm_set1_ps(low)), _mm_set1_ps(high));
    if (left >= 4) _mm_storeu_ps(y, r); else store_first<Four>(y, left, r);
  }
  PARING_INLINE void requantize(const A* a, const float* scale, const Packed& w, int8_t* y, int left) {
    __m128 r = _mm_mul_ps(_mm_cvtepi32_ps(a[0]), _mm_loadu_ps(scale));
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
    if (U > 1) for (; e + U <= end; e += U, v += U * R * 4)
      UNROLL for (int u = 0; u < U; u++) block(u, e + u, v + u * R * 4);
    for (; e < end; e++, v += R * 4) block(0, e, v);
    UNROLL for (int u = 1; u < U; u++)
      UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int n = 0; n < N; n++) a[0][p][n] = D::add(a[0][p][n], a[u][p][n]);
    int left = w.outputs - g * R, p = 0;
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
      UNROLL for (p = 0; p + 4 <= P; p += 4) {
        __m512i q[4];
        UNROLL for (int i = 0; i < 4; i++) q[i] = D::requantized(a[0][p + i][0], s, w);
        __m512i b = _mm512_packs_epi16(_mm512_adds_epi16(_mm512_packs_epi32(q[0], q[1]), zero), _mm512_adds_epi16(_mm512_packs_epi32(q[2], q[3]), zero));
        b = _mm512_permutexvar_epi32(order, _mm512_min_epi8(_mm512_max_epi8(b, low), high));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at(p) + g * R), _mm512_castsi512_si128(b));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at(p + 1) + g * R), _mm512_extracti32x4_epi32(b, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at(p + 2) + g * R), _mm512_extracti32x4_epi32(b, 2));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at(p + 3) + g * R), _mm512_extracti32x4_epi32(b, 3));
      }
    }
#endif
    UNROLL for (int i = 0; i < P; i++) if (i >= p) D::requantize(a[0][i], scale, w, reinterpret_cast<int8_t*>(at(i)) + g * R, left);
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

// ---- tables ----------------------------------------------------------------------------------------------------------

// Tiles of L lines x C columns up to `most` pixels; several lines only where one line would leave the tile half empty.
struct Table { TileFn at[2][most_lines][most_columns]; };
constexpr bool fits(int lines, int columns, int most) {
  return lines * columns <= most && (lines == 1 || (columns >= 2 && (lines + 1) * columns > most / 2));
}

template <class S, int N, int most, int I> constexpr void fill_f32(Table& t) {
  constexpr int L = I / most_columns + 1, C = I % most_columns + 1;
  if constexpr (fits(L, C, most)) { t.at[0][L - 1][C - 1] = f32_tile<S, N, L, C, uint16_t>; t.at[1][L - 1][C - 1] = f32_tile<S, N, L, C, int32_t>; }
  if constexpr (I + 1 < most_lines * most_columns) fill_f32<S, N, most, I + 1>(t);
}
template <class D, bool dynamic, int most, int I> constexpr void fill_int8(Table& t) {
  constexpr int L = I / most_columns + 1, C = I % most_columns + 1;
  if constexpr (fits(L, C, most)) { t.at[0][L - 1][C - 1] = int8_tile<D, L, C, uint16_t, dynamic>; t.at[1][L - 1][C - 1] = int8_tile<D, L, C, int32_t, dynamic>; }
  if constexpr (I + 1 < most_lines * most_columns) fill_int8<D, dynamic, most, I + 1>(t);
}
template <class S, int N, int most> constexpr Table f32_table() { Table t = {}; fill_f32<S, N, most, 0>(t); return t; }
template <class D, bool dynamic, int most> constexpr Table int8_table() { Table t = {}; fill_int8<D, dynamic, most, 0>(t); return t; }
template <int C> constexpr void fill_bitmap(Table& t) { t.at[0][0][C - 1] = bitmap_tile<1, C>; if constexpr (C > 1) fill_bitmap<C - 1>(t); }
constexpr Table bitmap_table() { Table t = {}; fill_bitmap<4>(t); return t; }

// Registers: sums, the weights of a block, and one or two for activations.
constexpr int pixels_for(int vectors) { return (registers - vectors - 2) / vectors > most_columns ? most_columns : (registers - vectors - 2) / vectors; }

#define NAME_(text, target) text "/" #target
#define NAME(text, target) NAME_(text, target)
constexpr Isa this_isa = Isa::PARING_TARGET;

#if WIDE
using S16 = Native; using S8 = Eight; using S4 = Four;
constexpr int N16 = 1, N8 = 1, N4 = 1;
using D16 = Dot16; using D4 = Dot4;
#elif defined(__AVX2__)
using S16 = Native; using S8 = Native; using S4 = Four;
constexpr int N16 = 2, N8 = 1, N4 = 1;
using D16 = Dot16Pair; using D4 = Dot4;
#else
using S16 = Native; using S8 = Native; using S4 = Native;
constexpr int N16 = 4, N8 = 2, N4 = 1;
using D16 = DotPlain<16>; using D4 = DotPlain<4>;
#endif
#if defined(__AVX2__)
constexpr int P16 = pixels_for(D16::vectors), P4 = pixels_for(1) < 12 ? pixels_for(1) : 12;
#else
constexpr int P16 = 2, P4 = 4;
#endif
constexpr int H = D16::halves;
constexpr Order order = H == 1 ? Order::dot4 : Order::dot2;

constexpr Table f32_16 = f32_table<S16, N16, pixels_for(N16)>(), f32_8 = f32_table<S8, N8, pixels_for(N8)>();
constexpr Table f32_4 = f32_table<S4, N4, (pixels_for(N4) < 12 ? pixels_for(N4) : 12)>(), f32_bitmap = bitmap_table();
constexpr Table s8_16 = int8_table<D16, false, P16>(), s8_4 = int8_table<D4, false, P4>();
constexpr Table qd8_16 = int8_table<D16, true, P16>(), qd8_4 = int8_table<D4, true, P4>();

constexpr Kernel table[] = {
    {NAME("f32-16x1", PARING_TARGET), this_isa, PARING_F32, 16, 1, Order::plain, 4, pixels_for(N16), f32_16.at, nullptr, nullptr},
    {NAME("f32-8x1", PARING_TARGET), this_isa, PARING_F32, 8, 1, Order::plain, 4, pixels_for(N8), f32_8.at, nullptr, nullptr},
    {NAME("f32-4x1", PARING_TARGET), this_isa, PARING_F32, 4, 1, Order::plain, 4, pixels_for(N4) < 12 ? pixels_for(N4) : 12, f32_4.at, nullptr, nullptr},
    {NAME("f32-bitmap", PARING_TARGET), this_isa, PARING_F32, bitmap_lanes, 1, Order::bitmap, 4, 4, f32_bitmap.at, nullptr, nullptr},
    {NAME("s8-16x4", PARING_TARGET), this_isa, PARING_S8, 16, 4, order, 4 * H, P16, s8_16.at, widen<H>, nullptr},
    {NAME("s8-4x4", PARING_TARGET), this_isa, PARING_S8, 4, 4, order, 4 * H, P4, s8_4.at, widen<H>, nullptr},
    {NAME("qd8-16x4", PARING_TARGET), this_isa, PARING_QD8, 16, 4, order, 4 * H, P16, qd8_16.at, widen<H>, quantize<H>},
    {NAME("qd8-4x4", PARING_TARGET), this_isa, PARING_QD8, 4, 4, order, 4 * H, P4, qd8_4.at, widen<H>, quantize<H>},
};

}  // namespace

KernelList rows() { return {table, int(sizeof table / sizeof *table)}; }

}  // namespace PARING_TARGET
}  // namespace paring
