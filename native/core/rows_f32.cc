// Float32 kernels whose lanes are output channels: NHWC in, NHWC out, no layout change. A block of R outputs x 1 input is
// one or more vectors of weights, fed to all pixels of a tile by broadcasting their activations.
#include "rows.h"

namespace paring {
namespace PARING_TARGET {
namespace {

// Unstructured weights with few pixels are summed one by one: no vector instruction gathers activations faster than two
// scalar loads a cycle bring them, and a weight costs six bytes.
// N vectors are the R outputs of a block. Few pixels leave too few sums in flight to hide the latency of an FMA (4 or 5
// cycles, up to two a cycle): then several blocks are summed apart, `U` of them.
template <class S, int N, int L, int C, class E> void f32_tile(const Tile& t) {
  using V = typename S::V;
  constexpr int P = L * C, R = N * S::lanes, U = P * N >= 8 ? 1 : P * N >= 4 ? 2 : P * N >= 2 ? 4 : 8;
  const Packed& w = *t.w;
  const float* bias = static_cast<const float*>(w.bias);
  const char* ahead = t.ahead;
  int share = t.ahead_bytes / (w.passes * (t.last - t.first));
  for (int pass = 0; pass < w.passes; pass++)
    for (int g = t.first; g < t.last; g++) {
      const uint32_t* s = w.start + size_t(pass) * w.groups + g;
      const E *e = static_cast<const E*>(t.entry) + s[0], *end = static_cast<const E*>(t.entry) + s[1];
      const float* v = static_cast<const float*>(w.value) + size_t(s[0]) * R;
      int left = w.outputs - g * R;
      if (P >= 4) ahead = prefetch(ahead, share);
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
      if (U > 1) for (; e + U <= end; e += U, v += U * R) {
        if (P <= 2 && R >= 8) fetch<U * R * 4>(v);
        UNROLL for (int u = 0; u < U; u++) block(u, e + u, v + u * R);
      }
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
constexpr int P16 = pixels_for(N16, most_columns), P8 = pixels_for(N8, most_columns), P4 = pixels_for(1, 12), P1 = 4;

template <int L, int C, class E> struct Make16 { static constexpr TileFn tile = f32_tile<S16, N16, L, C, E>; };
template <int L, int C, class E> struct Make8 { static constexpr TileFn tile = f32_tile<S8, N8, L, C, E>; };
template <int L, int C, class E> struct Make4 { static constexpr TileFn tile = f32_tile<S4, 1, L, C, E>; };
template <int L, int C, class E> struct Make1 { static constexpr TileFn tile = f32_tile<One, 1, L, C, E>; };
constexpr Table f32_16 = tiles<Make16, P16>(), f32_8 = tiles<Make8, P8>(), f32_4 = tiles<Make4, P4>(), f32_1 = tiles<Make1, P1>();

constexpr Kernel table[] = {
    {NAME("f32-16x1", PARING_TARGET), this_isa, PARING_F32, 16, 1, Order::plain, 4, P16, f32_16.at, nullptr, nullptr},
    {NAME("f32-8x1", PARING_TARGET), this_isa, PARING_F32, 8, 1, Order::plain, 4, P8, f32_8.at, nullptr, nullptr},
    {NAME("f32-4x1", PARING_TARGET), this_isa, PARING_F32, 4, 1, Order::plain, 4, P4, f32_4.at, nullptr, nullptr},
    {NAME("f32-1x1", PARING_TARGET), this_isa, PARING_F32, 1, 1, Order::plain, 4, P1, f32_1.at, nullptr, nullptr},
};

}  // namespace

KernelList rows_f32() { return {table, int(sizeof table / sizeof *table)}; }

}  // namespace PARING_TARGET
}  // namespace paring
