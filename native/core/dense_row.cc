// One row of x: as fast as weights come from memory. They are read as they lie, a few rows of them at once over all columns,
// into sums that stay in the nearest cache.
#include "dense_kernels.h"
#include "dense_simd.h"

namespace paring {
namespace PARING_TARGET {
namespace {

constexpr int line = 64;   // columns of a cache line of int8

// G rows of weights, columns [c, c + V vectors).
template <int G, int V> PARING_INLINE void group8(const F* x, const int8_t* w, ptrdiff_t row, float* sums) {
  UNROLL for (int v = 0; v < V; v++) {
    F a = load(sums + v * width);
    UNROLL for (int g = 0; g < G; g++) a = madd(x[g], from_int8(w + g * row + v * width), a);
    store(sums + v * width, a);
  }
}

template <int G> PARING_INLINE void rows8(const float* x, const int8_t* w, ptrdiff_t row, int n, float* sums) {
  F b[G];
  UNROLL for (int g = 0; g < G; g++) b[g] = all(x[g]);
  int c = 0;
  for (; c + line <= n; c += line) {
    // The same columns of the next group: the hardware's own prefetching ends with a page.
    UNROLL for (int g = 0; g < G; g++) __builtin_prefetch(w + (G + g) * row + c, 0, 2);
    group8<G, line / width>(b, w + c, row, sums + c);
  }
  for (; c < n; c += width) group8<G, 1>(b, w + c, row, sums + c);
}

void row8(const float* x, const int8_t* w, ptrdiff_t row, int64_t k, int n, float* sums) {
  constexpr int G = 8;
  for (; k >= G; k -= G, x += G, w += G * row) rows8<G>(x, w, row, n, sums);
  for (; k > 0; k--, x++, w += row) rows8<1>(x, w, row, n, sums);
}

// `first` to `last` nibbles of G rows of bytes.
template <int G, int V> PARING_INLINE void group4(const float* x, const uint8_t* w, ptrdiff_t row, const float* scale, float* sums) {
  UNROLL for (int v = 0; v < V; v++) {
    F even = all(0), odd = all(0);
    UNROLL for (int g = 0; g < G; g++) {
      F low, high;
      from_int4(w + g * row + v * width, &low, &high);
      even = madd(all(x[2 * g]), low, even), odd = madd(all(x[2 * g + 1]), high, odd);
    }
    F s = scale ? load(scale + v * width) : all(1);
    store(sums + v * width, madd(add(even, odd), s, load(sums + v * width)));
  }
}

template <int G> PARING_INLINE void rows4(const float* x, const uint8_t* w, ptrdiff_t row, int n, const float* scale, float* sums) {
  int c = 0;
  for (; c + line <= n; c += line) {
    UNROLL for (int g = 0; g < G; g++) __builtin_prefetch(w + (G + g) * row + c, 0, 2);
    group4<G, line / width>(x, w + c, row, scale ? scale + c : scale, sums + c);
  }
  for (; c < n; c += width) group4<G, 1>(x, w + c, row, scale ? scale + c : scale, sums + c);
}

void single4(float x, const uint8_t* w, int odd, int n, const float* scale, float* sums) {
  for (int c = 0; c < n; c += width) {
    F low, high;
    from_int4(w + c, &low, &high);
    F product = mul(all(x), odd ? high : low);
    store(sums + c, madd(product, scale ? load(scale + c) : all(1), load(sums + c)));
  }
}

void row4(const float* x, const uint8_t* w, ptrdiff_t row, int odd, int64_t k, int n, const float* scale, float* sums) {
  if (odd && k > 0) single4(*x, w, 1, n, scale, sums), x++, w += row, k--;
  for (; k >= 32; k -= 32, x += 32, w += 16 * row) rows4<16>(x, w, row, n, scale, sums);
  for (; k >= 8; k -= 8, x += 8, w += 4 * row) rows4<4>(x, w, row, n, scale, sums);
  for (; k >= 2; k -= 2, x += 2, w += row) rows4<1>(x, w, row, n, scale, sums);
  if (k) single4(*x, w, 0, n, scale, sums);
}

// R rows of weights along k, in two sums each.
template <int R> PARING_INLINE void dot(const float* x, const int8_t* w, ptrdiff_t row, int64_t k, float* sums) {
  F a[R][2];
  UNROLL for (int r = 0; r < R; r++) a[r][0] = a[r][1] = all(0);
  int64_t j = 0;
  for (; j + 2 * width <= k; j += 2 * width)
    UNROLL for (int i = 0; i < 2; i++) {
      F b = load(x + j + i * width);
      UNROLL for (int r = 0; r < R; r++) a[r][i] = madd(b, from_int8(w + r * row + j + i * width), a[r][i]);
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

constexpr DenseRow table = {width, row8, row4, dots};

}  // namespace

const DenseRow& dense_row() { return table; }

}  // namespace PARING_TARGET
}  // namespace paring
