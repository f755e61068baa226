// One row of x: as fast as weights come from memory. They are read as they lie, a few rows of them at once over all columns,
// into sums that stay in the nearest cache.
#include "dense_kernels.h"
#include "dense_simd.h"

namespace paring {
namespace PARING_TARGET {
namespace {

constexpr int line = 64, piece = width == 4 ? 32 : line;   // columns of a cache line of int8, and of what is summed in registers

// Lines of the same columns lie apart by the length of a row, which often puts all of them into one set of the nearest cache:
// each is read up before the next one. The weights of the next but one group are fetched meanwhile, as the hardware's own
// prefetching ends with a page.
template <int G> PARING_INLINE void fetch(const void* w, ptrdiff_t row, int c) {
  if (c % line == 0) UNROLL for (int g = 0; g < G; g++) __builtin_prefetch(static_cast<const char*>(w) + (2 * G + g) * row + c, 0, 2);
}

// Calls f(V, c) for vectors of columns: V of them at once, then one by one.
template <int V> struct Vectors { static constexpr int count = V; };
template <class Body> PARING_INLINE void columns(int n, Body f) {
  int c = 0;
  for (; c + piece <= n; c += piece) f(Vectors<piece / width>(), c);
  for (; c < n; c += width) f(Vectors<1>(), c);
}

template <int G> PARING_INLINE void rows8(const float* x, const int8_t* w, ptrdiff_t row, int n, float* sums) {
  columns(n, [&](auto vectors, int c) __attribute__((always_inline)) {
    constexpr int V = decltype(vectors)::count;
    fetch<G>(w, row, c);
    F a[V];
    UNROLL for (int v = 0; v < V; v++) a[v] = load(sums + c + v * width);
    UNROLL for (int g = 0; g < G; g++) {
      F b = all(x[g]);
      UNROLL for (int v = 0; v < V; v++) a[v] = madd(b, from_int8(w + g * row + c + v * width), a[v]);
    }
    UNROLL for (int v = 0; v < V; v++) store(sums + c + v * width, a[v]);
  });
}

void row8(const float* x, const int8_t* w, ptrdiff_t row, int64_t k, int n, float* sums) {
  constexpr int G = 8;
  for (; k >= G; k -= G, x += G, w += G * row) rows8<G>(x, w, row, n, sums);
  for (; k > 0; k--, x++, w += row) rows8<1>(x, w, row, n, sums);
}

// Adds up V sums of a group, scaled.
template <int V> PARING_INLINE void settle(const F* a, const float* scale, float* sums) {
  UNROLL for (int v = 0; v < V; v++) {
    F before = load(sums + v * width);
    store(sums + v * width, scale ? madd(a[v], load(scale + v * width), before) : add(a[v], before));
  }
}

// G rows of bytes: 2 G of weights.
template <int G> PARING_INLINE void rows4(const float* x, const uint8_t* w, ptrdiff_t row, int n, const float* scale, float* sums) {
  columns(n, [&](auto vectors, int c) __attribute__((always_inline)) {
    constexpr int V = decltype(vectors)::count;
    fetch<G>(w, row, c);
    F a[V];
    UNROLL for (int v = 0; v < V; v++) a[v] = all(0);
    UNROLL for (int g = 0; g < G; g++) {
      F even = all(x[2 * g]), odd = all(x[2 * g + 1]);
      UNROLL for (int v = 0; v < V; v++) {
        F low, high;
        from_int4(w + g * row + c + v * width, &low, &high);
        a[v] = madd(odd, high, madd(even, low, a[v]));
      }
    }
    settle<V>(a, scale ? scale + c : scale, sums + c);
  });
}

void single4(float x, const uint8_t* w, int odd, int n, const float* scale, float* sums) {
  for (int c = 0; c < n; c += width) {
    F low, high;
    from_int4(w + c, &low, &high);
    F product = mul(all(x), odd ? high : low);
    settle<1>(&product, scale ? scale + c : scale, sums + c);
  }
}

void row4(const float* x, const uint8_t* w, ptrdiff_t row, int odd, int64_t k, int n, const float* scale, float* sums) {
  if (odd && k > 0) single4(*x, w, 1, n, scale, sums), x++, w += row, k--;
  for (; k >= 32; k -= 32, x += 32, w += 16 * row) rows4<16>(x, w, row, n, scale, sums);
  for (; k >= 8; k -= 8, x += 8, w += 4 * row) rows4<4>(x, w, row, n, scale, sums);
  for (; k >= 2; k -= 2, x += 2, w += row) rows4<1>(x, w, row, n, scale, sums);
  if (k) single4(*x, w, 0, n, scale, sums);
}

#if defined(__AVX512BF16__)
// The same where x is bfloat16: two rows of weights and x in one instruction.
template <int G> PARING_INLINE void rows4_pairs(const uint16_t* x, const uint8_t* w, ptrdiff_t row, int n, const float* scale, float* sums) {
  columns(n, [&](auto vectors, int c) __attribute__((always_inline)) {
    constexpr int V = decltype(vectors)::count;
    fetch<G>(w, row, c);
    F a[V];
    UNROLL for (int v = 0; v < V; v++) a[v] = all(0);
    UNROLL for (int g = 0; g < G; g++) {
      int both;
      __builtin_memcpy(&both, x + 2 * g, 4);
      __m512bh b = __m512bh(_mm512_set1_epi32(both));
      UNROLL for (int v = 0; v < V; v++) {
        a[v] = _mm512_dpbf16_ps(a[v], b, __m512bh(pairs_from_int4(w + g * row + c + v * width)));
      }
    }
    settle<V>(a, scale ? scale + c : scale, sums + c);
  });
}

void row4_pairs(const uint16_t* x, const uint8_t* w, ptrdiff_t row, int64_t k, int n, const float* scale, float* sums) {
  for (; k >= 32; k -= 32, x += 32, w += 16 * row) rows4_pairs<16>(x, w, row, n, scale, sums);
  for (; k >= 8; k -= 8, x += 8, w += 4 * row) rows4_pairs<4>(x, w, row, n, scale, sums);
  for (; k > 0; k -= 2, x += 2, w += row) rows4_pairs<1>(x, w, row, n, scale, sums);
}
#else
constexpr void (*row4_pairs)(const uint16_t*, const uint8_t*, ptrdiff_t, int64_t, int, const float*, float*) = nullptr;
#endif

// R rows of weights along k, in two sums each.
template <int R> PARING_INLINE void dot(const float* x, const int8_t* w, ptrdiff_t row, int64_t k, float* sums) {
  F a[R][2];
  UNROLL for (int r = 0; r < R; r++) a[r][0] = a[r][1] = all(0);
  int64_t j = 0;
  for (; j + 2 * width <= k; j += 2 * width) {
    if (j % line == 0) UNROLL for (int r = 0; r < R; r++) __builtin_prefetch(w + (4 * R + r) * row + j, 0, 2);
    UNROLL for (int i = 0; i < 2; i++) {
      F b = load(x + j + i * width);
      UNROLL for (int r = 0; r < R; r++) a[r][i] = madd(b, from_int8(w + r * row + j + i * width), a[r][i]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) {
    float sum = total(add(a[r][0], a[r][1]));
    for (int64_t i = j; i < k; i++) sum += x[i] * float(w[r * row + i]);
    sums[r] = sum;
  }
}

void dots(const float* x, const int8_t* w, ptrdiff_t row, int64_t k, int64_t n, float* sums) {
  constexpr int R = 4;
  for (; n >= R; n -= R, w += R * row, sums += R) dot<R>(x, w, row, k, sums);
  for (; n > 0; n--, w += row, sums++) dot<1>(x, w, row, k, sums);
}

constexpr DenseRow table = {width, row8, row4, row4_pairs, dots};

}  // namespace

const DenseRow& dense_row() { return table; }

}  // namespace PARING_TARGET
}  // namespace paring
