// One vector of floats per instruction set, so that a kernel is written once. A file that includes this is compiled once
// per target (CMakeLists.txt) with PARING_TARGET set to portable, avx2, avx2vnni, avx512, avx512vnni or avx512bf16; everything it
// defines lives in paring::PARING_TARGET. Such files use no function of the standard library: an inline one compiled here
// with AVX-512 could be the copy that the linker keeps for everybody.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace paring {
namespace PARING_TARGET {

#define PARING_INLINE static inline __attribute__((always_inline))

// PARING_NARROW: a build for tests runs the 256-bit targets in their AVX-512 encoding, see CMakeLists.txt.
#if defined(__AVX512F__) && !defined(PARING_NARROW)
constexpr int width = 16;
using F = __m512;
PARING_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
PARING_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
PARING_INLINE F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
PARING_INLINE void store_part(float* p, int n, F a) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a); }
PARING_INLINE F all(float a) { return _mm512_set1_ps(a); }
PARING_INLINE F madd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
PARING_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
PARING_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
PARING_INLINE F least(F a, F b) { return _mm512_min_ps(a, b); }
PARING_INLINE F most(F a, F b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
constexpr int width = 8;
using F = __m256;
PARING_INLINE __m256i first_lanes(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
PARING_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
PARING_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
PARING_INLINE F load_part(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
PARING_INLINE void store_part(float* p, int n, F a) { _mm256_maskstore_ps(p, first_lanes(n), a); }
PARING_INLINE F all(float a) { return _mm256_set1_ps(a); }
PARING_INLINE F madd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
PARING_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
PARING_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
PARING_INLINE F least(F a, F b) { return _mm256_min_ps(a, b); }
PARING_INLINE F most(F a, F b) { return _mm256_max_ps(a, b); }
#else
// GCC's and Clang's vectors: four floats are a register on every 64-bit processor.
constexpr int width = 4;
typedef float F __attribute__((vector_size(16)));
typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
PARING_INLINE F load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
PARING_INLINE void store(float* p, F a) { *reinterpret_cast<Unaligned*>(p) = a; }
PARING_INLINE F load_part(const float* p, int n) { F a = {0, 0, 0, 0}; for (int i = 0; i < n; i++) a[i] = p[i]; return a; }
PARING_INLINE void store_part(float* p, int n, F a) { for (int i = 0; i < n; i++) p[i] = a[i]; }
PARING_INLINE F all(float a) { return F{a, a, a, a}; }
PARING_INLINE F madd(F a, F b, F c) { return a * b + c; }
PARING_INLINE F add(F a, F b) { return a + b; }
PARING_INLINE F mul(F a, F b) { return a * b; }
PARING_INLINE F least(F a, F b) { return a < b ? a : b; }
PARING_INLINE F most(F a, F b) { return a > b ? a : b; }
#endif

}  // namespace PARING_TARGET
}  // namespace paring
