// Weights of 8 and 4 bits to vectors of floats, and bfloat16. Compiled once per target.
#pragma once
#include "simd.h"

namespace paring {
namespace PARING_TARGET {

#define UNROLL _Pragma("GCC unroll 32")

PARING_INLINE uint32_t bits_of(float f) { uint32_t b; __builtin_memcpy(&b, &f, 4); return b; }
PARING_INLINE float float_of(uint32_t b) { float f; __builtin_memcpy(&f, &b, 4); return f; }

// To nearest, ties to even; in integers, because the processor's own instruction takes small numbers for zero.
PARING_INLINE uint32_t round_bits(uint32_t b) {
  uint32_t nan = b | 0x400000, rounded = b + 0x7fff + (b >> 16 & 1);
  return ((b & 0x7fffffff) > 0x7f800000 ? nan : rounded) >> 16;
}

#if defined(__AVX512F__) && !defined(PARING_NARROW)
// Sixteen floats are what one permutation looks up.
PARING_INLINE __m512 nibbles() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1); }
PARING_INLINE F from_int8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
PARING_INLINE void from_int4(const uint8_t* p, F* low, F* high) {
  __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  *low = _mm512_permutexvar_ps(b, nibbles());
  *high = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), nibbles());
}
// Sixteen bytes to bfloat16, low and high nibble side by side.
PARING_INLINE __m512i pairs_from_int4(const uint8_t* p) {
  // All quarters have all bytes; of those a quarter's four go into both words of a lane each, the odd one moved by a nibble.
  const __m512i spread = _mm512_setr_epi32(
      0x80008000, 0x80018001, 0x80028002, 0x80038003, 0x80048004, 0x80058005, 0x80068006, 0x80078007,
      0x80088008, 0x80098009, 0x800a800a, 0x800b800b, 0x800c800c, 0x800d800d, 0x800e800e, 0x800f800f);
  // The table twice: of the five bits that select a word the upper one does not matter.
  const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(nibbles()), 16));
  const __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
  __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, spread), _mm512_set1_epi32(4 << 16));
  return _mm512_permutexvar_epi16(index, table);
}
PARING_INLINE F from_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
PARING_INLINE float total(F a) { return _mm512_reduce_add_ps(a); }
#elif defined(__AVX2__)
PARING_INLINE F from_int8(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
PARING_INLINE void from_int4(const uint8_t* p, F* low, F* high) {
  __m256i b = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  *low = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(b, 28), 28));
  *high = _mm256_cvtepi32_ps(_mm256_srai_epi32(b, 4));
}
PARING_INLINE F from_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
PARING_INLINE float total(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#else
typedef int8_t Bytes __attribute__((vector_size(4)));
typedef int32_t Ints __attribute__((vector_size(16)));
PARING_INLINE Ints ints_from(const void* p) {
  Bytes b;
  __builtin_memcpy(&b, p, 4);
  return __builtin_convertvector(b, Ints);
}
PARING_INLINE F from_int8(const int8_t* p) { return __builtin_convertvector(ints_from(p), F); }
PARING_INLINE void from_int4(const uint8_t* p, F* low, F* high) {
  Ints b = ints_from(p);
  *low = __builtin_convertvector((b << 28) >> 28, F);
  *high = __builtin_convertvector(b >> 4, F);
}
PARING_INLINE float total(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
#endif

}  // namespace PARING_TARGET
}  // namespace paring
