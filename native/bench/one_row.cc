// How fast one row of activations meets unstructured float32 weights: one weight at a time, by gathers, and by masks that are
// expanded into vectors. Says why the first one is the kernel. Everything is in the first- or second-level cache.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../core/clock.h"

#if defined(__x86_64__)
// GCC 12 takes the "undefined" operand of its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace {

constexpr int inputs = 2048, outputs = 16;
volatile float sink;

__attribute__((target("fma"))) void one_by_one(const uint16_t* index, const float* weight, int n, const float* x) {
  __m128 sum[8] = {};
  for (int i = 0; i + 8 <= n; i += 8)
#pragma GCC unroll 8
    for (int u = 0; u < 8; u++) sum[u] = _mm_fmadd_ss(_mm_load_ss(x + index[i + u]), _mm_load_ss(weight + i + u), sum[u]);
  for (__m128 s : sum) sink = sink + _mm_cvtss_f32(s);
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) void gathered(const uint16_t* index, const float* weight, int n, const float* x) {
  __m512 sum[4] = {};
  for (int i = 0; i + 64 <= n; i += 64)
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) {
      __m512i at = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + i + 16 * u)));
      sum[u] = _mm512_fmadd_ps(_mm512_loadu_ps(weight + i + 16 * u), _mm512_i32gather_ps(at, x, 4), sum[u]);
    }
  for (__m512 s : sum) sink = sink + _mm512_reduce_add_ps(s);
}

__attribute__((target("avx512f,popcnt"))) void expanded(const uint16_t* mask, const float* weight, const float* x) {
  __m512 sum[4] = {};
  for (int i = 0; i < inputs; i += 4)
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) {
      sum[u] = _mm512_fmadd_ps(_mm512_set1_ps(x[i + u]), _mm512_maskz_expandloadu_ps(mask[i + u], weight), sum[u]);
      weight += __builtin_popcount(mask[i + u]);
    }
  for (__m512 s : sum) sink = sink + _mm512_reduce_add_ps(s);
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl")) { std::puts("needs AVX-512"); return 0; }
  std::vector<float> x(inputs, 1.f);
  for (double density : {0.3, 0.2, 0.1}) {
    std::vector<uint16_t> mask(inputs), index;
    uint64_t state = 1;
    for (int i = 0; i < inputs; i++)
      for (int o = 0; o < outputs; o++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        if (double(state >> 40) < density * double(1 << 24)) { mask[size_t(i)] = uint16_t(mask[size_t(i)] | 1u << o); index.push_back(uint16_t(i)); }
      }
    std::vector<float> weight(index.size() + 64, 1.f);
    const int n = int(index.size()) / 64 * 64;
    const double one = paring::least_time([&] { one_by_one(index.data(), weight.data(), n, x.data()); }) / n;
    const double gather = paring::least_time([&] { gathered(index.data(), weight.data(), n, x.data()); }) / n;
    const double expand = paring::least_time([&] { expanded(mask.data(), weight.data(), x.data()); }) / double(index.size());
    std::printf("density %.1f: ns for a weight: one by one %.2f, gathered %.2f, expanded %.2f\n", density, one * 1e9, gather * 1e9, expand * 1e9);
  }
}
#else
int main() { std::puts("x86-64 only"); }
#endif
