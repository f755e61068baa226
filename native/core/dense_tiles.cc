// Tiles of several rows of x by several vectors of columns: weights are converted once into a strip that stays in the nearest
// caches, and read again for every tile of rows.
#include "dense_kernels.h"
#include "dense_simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace paring {
namespace PARING_TARGET {
namespace {

#if defined(__AVX512BF16__)
constexpr bool pairs = true;
using Element = uint16_t;
constexpr int depth = 256;
#else
constexpr bool pairs = false;
using Element = float;
constexpr int depth = width == 16 ? 128 : 256;   // 32 KB at most of a strip
#endif
constexpr int panel_elements = depth + 64 / int(sizeof(Element));   // rows of one cache set apart would push each other out

template <int V, int R> void tile(const void* panel, const void* strip, int k, const float* scale, float* sums) {
  const auto* x = static_cast<const Element*>(panel);
  F a[R][V];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) a[r][v] = all(0);
#if defined(__AVX512BF16__)
  const auto* w = static_cast<const __m512i*>(strip);
  for (int j = 0; j < k; j += 2, w += V) {
    __m512bh b[V];
    UNROLL for (int v = 0; v < V; v++) b[v] = __m512bh(w[v]);
    UNROLL for (int r = 0; r < R; r++) {
      int both;
      __builtin_memcpy(&both, x + r * panel_elements + j, 4);
      __m512bh c = __m512bh(_mm512_set1_epi32(both));
      UNROLL for (int v = 0; v < V; v++) a[r][v] = _mm512_dpbf16_ps(a[r][v], c, b[v]);
    }
  }
#else
  const auto* w = static_cast<const float*>(strip);
  for (int j = 0; j < k; j++, w += V * width) {
    F b[V];
    UNROLL for (int v = 0; v < V; v++) b[v] = load(w + v * width);
    UNROLL for (int r = 0; r < R; r++) {
      F c = all(x[r * panel_elements + j]);
      UNROLL for (int v = 0; v < V; v++) a[r][v] = madd(c, b[v], a[r][v]);
    }
  }
#endif
  if (scale) {
    UNROLL for (int v = 0; v < V; v++) {
      F s = load(scale + v * width);
      UNROLL for (int r = 0; r < R; r++) store(sums + (r * V + v) * width, madd(a[r][v], s, load(sums + (r * V + v) * width)));
    }
  } else {
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int v = 0; v < V; v++) store(sums + (r * V + v) * width, add(a[r][v], load(sums + (r * V + v) * width)));
  }
}

// -- x and results -----------------------------------------------------------------------------------------------------

void to_panel(const void* x, int bf16, int round, int64_t count, void* out) {
  auto* to = static_cast<Element*>(out);
  if (bf16) {
    const auto* from = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < count; i++) {
      if constexpr (pairs) to[i] = Element(from[i]);
      else to[i] = float_of(uint32_t(from[i]) << 16);
    }
  } else {
    const auto* from = static_cast<const float*>(x);
    for (int64_t i = 0; i < count; i++) {
      if constexpr (pairs) to[i] = Element(round_bits(bits_of(from[i])));
      else to[i] = round ? float_of(round_bits(bits_of(from[i])) << 16) : from[i];
    }
  }
}

void finish(const float* sums, const float* scale, int64_t count, int bf16, void* y) {
  if (bf16) {
    auto* to = static_cast<uint16_t*>(y);
    if (scale) for (int64_t i = 0; i < count; i++) to[i] = uint16_t(round_bits(bits_of(sums[i] * scale[i])));
    else for (int64_t i = 0; i < count; i++) to[i] = uint16_t(round_bits(bits_of(sums[i])));
  } else {
    auto* to = static_cast<float*>(y);
    if (scale) for (int64_t i = 0; i < count; i++) to[i] = sums[i] * scale[i];
    else for (int64_t i = 0; i < count; i++) to[i] = sums[i];
  }
}

void halves(const uint16_t* x, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + width <= count; i += width) store(out + i, from_half(x + i));
#endif
  for (; i < count; i++) {
    uint32_t sign = uint32_t(x[i] & 0x8000) << 16, rest = x[i] & 0x7fff;
    // The smallest ones by way of an integer: as floats they may count as zero.
    uint32_t value = rest < 0x400 ? bits_of(float(int(rest)) * 0x1p-24f) : (rest << 13) + (rest < 0x7c00 ? 112u << 23 : 224u << 23);
    out[i] = float_of(sign | value);
  }
}

// -- weights -----------------------------------------------------------------------------------------------------------

// Rows to fetch weights ahead: a strip takes one cache line of each, in pages of their own, which the hardware does not foresee.
// Into the second-level cache, as lines a page apart would push each other out of the first.
constexpr int ahead = 64;

#if defined(__AVX512BF16__)
// Integers of 8 bits leave the lower half of a float zero.
PARING_INLINE __m512i pair(F even, F odd) { return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd)); }

void strip8(const int8_t* w, ptrdiff_t row, int k, int columns, void* strip) {
  auto* to = static_cast<__m512i*>(strip);
  for (; k >= 2; k -= 2, w += 2 * row) {
    for (int c = 0; c < columns; c += 64) __builtin_prefetch(w + ahead * row + c, 0, 2), __builtin_prefetch(w + (ahead + 1) * row + c, 0, 2);
    for (int c = 0; c < columns; c += width) *to++ = pair(from_int8(w + c), from_int8(w + row + c));
  }
  if (k) for (int c = 0; c < columns; c += width) *to++ = pair(from_int8(w + c), all(0));
}

void strip4(const uint8_t* w, ptrdiff_t row, int, int k, int columns, const float*, void* strip) {
  auto* to = static_cast<__m512i*>(strip);
  for (int j = 0; j < k; j += 2, w += row) {
    for (int c = 0; c < columns; c += 64) __builtin_prefetch(w + ahead * row + c, 0, 2);
    for (int c = 0; c < columns; c += width) *to++ = pairs_from_int4(w + c);
  }
}
#else
void strip8(const int8_t* w, ptrdiff_t row, int k, int columns, void* strip) {
  auto* to = static_cast<float*>(strip);
  for (int j = 0; j < k; j++, w += row) {
    for (int c = 0; c < columns; c += 64) __builtin_prefetch(w + ahead * row + c, 0, 2);
    for (int c = 0; c < columns; c += width, to += width) store(to, from_int8(w + c));
  }
}

void strip4(const uint8_t* w, ptrdiff_t row, int odd, int k, int columns, const float* scale, void* strip) {
  auto* to = static_cast<float*>(strip);
  for (int j = odd; j < k + odd; w += row, j += 2 - (j & 1)) {
    for (int c = 0; c < columns; c += 64) __builtin_prefetch(w + ahead * row + c, 0, 2);
    bool even = !(j & 1), both = even && j + 1 < k + odd;
    for (int c = 0; c < columns; c += width) {
      F low, high, s = scale ? load(scale + c) : all(1);
      from_int4(w + c, &low, &high);
      if (even) store(to + c, mul(low, s));
      if (both) store(to + columns + c, mul(high, s));
      if (!even) store(to + c, mul(high, s));
    }
    to += both ? 2 * columns : columns;
  }
}
#endif

void turn(const int8_t* w, ptrdiff_t row, int k, int n, int columns, int8_t* out) {
  for (int c = 0; c < columns; c += 16) {
    int j = 0, rows = columns - c < 16 ? columns - c : 16, there = n - c < rows ? n - c : rows;
#if defined(__SSE2__)
    if (there == 16) for (; j + 16 <= k; j += 16) {
      // Four rounds of interleaving rows i and i + 8 turn 16 x 16 bytes.
      __m128i a[16], b[16];
      UNROLL for (int i = 0; i < 16; i++) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + (c + i) * row + j));
      UNROLL for (int round = 0; round < 4; round++) {
        UNROLL for (int i = 0; i < 8; i++) b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]), b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        UNROLL for (int i = 0; i < 16; i++) a[i] = b[i];
      }
      UNROLL for (int i = 0; i < 16; i++) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (j + i) * columns + c), a[i]);
    }
#endif
    for (; j < k; j++)
      for (int i = 0; i < rows; i++) out[j * columns + c + i] = i < there ? w[(c + i) * row + j] : int8_t(0);
  }
}

// -- the table ---------------------------------------------------------------------------------------------------------

template <int V, int most, int R = 1> constexpr void fill(DenseTile* row) {
  row[R - 1] = tile<V, R>;
  if constexpr (R < most) fill<V, most, R + 1>(row);
}

constexpr DenseTiles table() {
  DenseTiles t = {};
  t.pairs = pairs, t.depth = depth, t.panel_row = panel_elements * int(sizeof(Element)), t.lanes = width;
  t.widths = width == 16 ? 3 : 2;
  t.rows[0] = width == 4 ? 6 : 12, t.rows[1] = width == 16 ? 12 : width == 8 ? 6 : 4, t.rows[2] = 6;
  fill<1, width == 4 ? 6 : 12>(t.tiles[0]);
  fill<2, width == 16 ? 12 : width == 8 ? 6 : 4>(t.tiles[1]);
  if (width == 16) fill<4, 6>(t.tiles[2]);
  t.panel = to_panel, t.strip8 = strip8, t.strip4 = strip4, t.turn = turn, t.halves = halves, t.finish = finish;
  return t;
}
constexpr DenseTiles tiles = table();

}  // namespace

const DenseTiles& dense_tiles() { return tiles; }

}  // namespace PARING_TARGET
}  // namespace paring
