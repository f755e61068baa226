// What passes between dense.cc and the inner kernels of products with dense weights: several rows of x by tiles (dense_tiles.cc)
// and a single one (dense_row.cc), compiled once per target. Plain data only: see simd.h on why.
//
// A strip is a piece of the weights, converted: up to `depth` of k by as many columns as a tile is wide, [k][columns] floats, or
// with `pairs` bfloat16 in [k / 2][columns][2]. A panel is a piece of x: rows of `panel_row` bytes, floats or bfloat16 alike.
// An odd k of bfloat16 is followed by a zero in both.
#pragma once
#include <cstddef>
#include <cstdint>

namespace paring {

constexpr int dense_widths = 3, dense_rows = 12, dense_columns = 64;   // at most: widths of tiles, rows and columns of one

// sums[row][column] += scale[column] * sum over k of panel * strip; a null scale is ones.
using DenseTile = void (*)(const void* panel, const void* strip, int k, const float* scale, float* sums);

struct DenseTiles {
  int pairs, depth, panel_row;
  int lanes, widths;                     // tiles are `lanes` << i columns wide, i below `widths`
  int rows[dense_widths];                // of a tile at most
  DenseTile tiles[dense_widths][dense_rows];   // [i][rows - 1]

  // `count` neighbours of x (floats or bfloat16) into a panel, rounded to bfloat16 where `round` or the panel says so.
  void (*panel)(const void* x, int bf16, int round, int64_t count, void* out);
  // k rows of weights, `row` bytes apart, into a strip of `columns`.
  void (*strip8)(const int8_t* w, ptrdiff_t row, int k, int columns, void* strip);
  // The same from 4 bits, from the high nibble on where `odd`; times scale[column] where there is one. Pairs take neither.
  void (*strip4)(const uint8_t* w, ptrdiff_t row, int odd, int k, int columns, const float* scale, void* strip);
  // Weights [n][k], `row` bytes apart, to [k][columns] with zeros from n on.
  void (*turn)(const int8_t* w, ptrdiff_t row, int k, int n, int columns, int8_t* out);
  void (*halves)(const uint16_t* x, int64_t count, float* out);   // float16 to float
  // scale[i] * sums[i] into y; a null scale is ones.
  void (*finish)(const float* sums, const float* scale, int64_t count, int bf16, void* y);
};

// One row of x, as floats. n: multiples of `lanes`.
struct DenseRow {
  int lanes;
  // sums[column] += sum over k of x * w
  void (*row8)(const float* x, const int8_t* w, ptrdiff_t row, int64_t k, int n, float* sums);
  // sums[column] += scale[column] * the same, from 4 bits, from the high nibble on where `odd`; a null scale is ones.
  void (*row4)(const float* x, const uint8_t* w, ptrdiff_t row, int odd, int64_t k, int n, const float* scale, float* sums);
  // The same with bfloat16, from the low nibble on, an odd k of x followed by a zero; null where there is none.
  void (*row4_pairs)(const uint16_t* x, const uint8_t* w, ptrdiff_t row, int64_t k, int n, const float* scale, float* sums);
  // sums[i] = sum over k of x * w[i] for n rows of weights (any n).
  void (*dots)(const float* x, const int8_t* w, ptrdiff_t row, int64_t k, int64_t n, float* sums);
};

namespace portable { const DenseTiles& dense_tiles(); const DenseRow& dense_row(); }
namespace avx2 { const DenseTiles& dense_tiles(); const DenseRow& dense_row(); }
namespace avx512 { const DenseTiles& dense_tiles(); const DenseRow& dense_row(); }
namespace avx512bf16 { const DenseTiles& dense_tiles(); const DenseRow& dense_row(); }

}  // namespace paring
