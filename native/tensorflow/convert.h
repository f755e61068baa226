// Rows of numbers between bfloat16 and float, as the compiler makes vectors of them.
#pragma once
#include <cstdint>
#include <cstring>

namespace paring {
namespace tensorflow {

inline uint32_t bits_of(float f) { uint32_t b; std::memcpy(&b, &f, 4); return b; }
inline float from_bits(uint32_t b) { float f; std::memcpy(&f, &b, 4); return f; }

// To nearest, ties to even; NaN stays NaN.
inline uint32_t rounded_bits(float f) {
  uint32_t b = bits_of(f), up = b + 0x7fff + (b >> 16 & 1), quiet = b | 0x400000;
  return (b & 0x7fffffff) > 0x7f800000 ? quiet : up;
}

inline void widen(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] = from_bits(uint32_t(from[i]) << 16);
}
inline void round_to_bfloat16(const float* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] = from_bits(rounded_bits(from[i]) & 0xffff0000);
}
inline void scale_row(float* row, const float* scale, int64_t n) {
  for (int64_t i = 0; i < n; i++) row[i] *= scale[i];
}
inline void scale_row_to_bfloat16(const float* row, const float* scale, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; i++) to[i] = uint16_t(rounded_bits(row[i] * scale[i]) >> 16);
}

}  // namespace tensorflow
}  // namespace paring
