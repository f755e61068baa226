// Float32 kernels whose lanes are output channels: NHWC in, NHWC out, no layout change. A block of R outputs x 1 input is
// one or more vectors of weights, fed to all pixels of a tile by broadcasting their activations.
#include "rows.h"

namespace paring {
namespace PARING_TARGET {
namespace {

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


#if WIDE
using S16 = Native; using S8 = Eight; using S4 = Four;
constexpr int N16 = 1, N8 = 1;
#elif defined(__AVX2__)
using S16 = Native; using S8 = Native; using S4 = Four;
constexpr int N16 = 2, N8 = 1;
#else
using S16 = Native; using S8 = Native; using S4 = Native;
constexpr int N16 = 4, N8 = 2;
#endif
constexpr int P16 = pixels_for(N16, most_columns), P8 = pixels_for(N8, most_columns), P4 = pixels_for(1, 12);

template <int L, int C, class E> struct Make16 { static constexpr TileFn tile = f32_tile<S16, N16, L, C, E>; };
template <int L, int C, class E> struct Make8 { static constexpr TileFn tile = f32_tile<S8, N8, L, C, E>; };
template <int L, int C, class E> struct Make4 { static constexpr TileFn tile = f32_tile<S4, 1, L, C, E>; };
constexpr Table f32_16 = tiles<Make16, P16>(), f32_8 = tiles<Make8, P8>(), f32_4 = tiles<Make4, P4>();
constexpr Table bitmap = {{{{bitmap_tile<1, 1>, bitmap_tile<1, 2>, bitmap_tile<1, 3>, bitmap_tile<1, 4>}}}};

constexpr Kernel table[] = {
    {NAME("f32-16x1", PARING_TARGET), this_isa, PARING_F32, 16, 1, Order::plain, 4, P16, f32_16.at, nullptr, nullptr},
    {NAME("f32-8x1", PARING_TARGET), this_isa, PARING_F32, 8, 1, Order::plain, 4, P8, f32_8.at, nullptr, nullptr},
    {NAME("f32-4x1", PARING_TARGET), this_isa, PARING_F32, 4, 1, Order::plain, 4, P4, f32_4.at, nullptr, nullptr},
    {NAME("f32-bitmap", PARING_TARGET), this_isa, PARING_F32, bitmap_lanes, 1, Order::bitmap, 4, 4, bitmap.at, nullptr, nullptr},
};

}  // namespace

KernelList rows_f32() { return {table, int(sizeof table / sizeof *table)}; }

}  // namespace PARING_TARGET
}  // namespace paring
