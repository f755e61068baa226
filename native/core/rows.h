// What the kernels of the NHWC family share: tiles that are instantiated, and small vectors. Compiled once per target.
#pragma once
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
#if defined(__AVX2__)
struct One {
  using V = __m128;
  static constexpr int lanes = 1;
  PARING_INLINE V load(const float* p) { return _mm_load_ss(p); }
  PARING_INLINE void store(float* p, V a) { _mm_store_ss(p, a); }
  PARING_INLINE V all(float a) { return _mm_set_ss(a); }
  PARING_INLINE V madd(V a, V b, V c) { return _mm_fmadd_ss(a, b, c); }
  PARING_INLINE V add(V a, V b) { return _mm_add_ss(a, b); }
  PARING_INLINE V least(V a, V b) { return _mm_min_ss(a, b); }
  PARING_INLINE V most(V a, V b) { return _mm_max_ss(a, b); }
};
#else
struct One {
  using V = float;
  static constexpr int lanes = 1;
  PARING_INLINE V load(const float* p) { return *p; }
  PARING_INLINE void store(float* p, V a) { *p = a; }
  PARING_INLINE V all(float a) { return a; }
  PARING_INLINE V madd(V a, V b, V c) { return a * b + c; }
  PARING_INLINE V add(V a, V b) { return a + b; }
  PARING_INLINE V least(V a, V b) { return a < b ? a : b; }
  PARING_INLINE V most(V a, V b) { return a > b ? a : b; }
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

// Brings `bytes` from `at` on into the second-level cache while a tile is computed; gives where to go on.
PARING_INLINE const char* prefetch(const char* at, int bytes) {
  for (const char* end = at + bytes; at < end; at += 64) __builtin_prefetch(at, 0, 2);
  return at;
}

// Few pixels read weights at the pace of the third-level cache: lines are asked for two pages ahead, where the hardware's own
// prefetching stops at each page.
template <int bytes> PARING_INLINE void fetch(const void* weights) {
  UNROLL for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(weights) + 8192 + i, 0, 3);
}

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

// Tiles of L lines x C columns of at most `most` pixels. Not every width is worth its code; several lines only where one
// would leave the tile half empty. A flat run of pixels (1x1) has one line and entries of 16 bits, all else 32 bits.
struct Table { TileFn at[2][most_lines][most_columns]; };
constexpr bool fits(int lines, int columns, int most, bool wide) {
  bool width = columns <= 8 || columns == 10 || columns == 12 || columns == 14 || columns == 16 || columns == 20 || columns == 24 || columns == 28;
  if (!width || lines * columns > most) return false;
  return lines == 1 || (wide && columns >= 3 && (lines + 1) * columns > most / 2);
}
template <template <int, int, class> class Make, int most, int I = 0> constexpr void fill(Table& t) {
  constexpr int L = I / most_columns + 1, C = I % most_columns + 1;
  if constexpr (fits(L, C, most, false)) t.at[0][L - 1][C - 1] = Make<L, C, uint16_t>::tile;
  if constexpr (fits(L, C, most, true)) t.at[1][L - 1][C - 1] = Make<L, C, int32_t>::tile;
  if constexpr (I + 1 < most_lines * most_columns) fill<Make, most, I + 1>(t);
}
template <template <int, int, class> class Make, int most> constexpr Table tiles() { Table t = {}; fill<Make, most>(t); return t; }

// Registers: sums, the weights of a block, and one or two for activations.
constexpr int pixels_for(int vectors, int most) {
  int n = (registers - vectors - 2) / vectors;
  return n < most ? n : most;
}

#define NAME_(text, target) text "/" #target
#define NAME(text, target) NAME_(text, target)
constexpr Isa this_isa = Isa::PARING_TARGET;

}  // namespace
}  // namespace PARING_TARGET
}  // namespace paring
