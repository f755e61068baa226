#include "planes.h"

#include "simd.h"

namespace paring {
namespace PARING_TARGET {
namespace {

PARING_INLINE const float* at(const float* p, int32_t bytes) { return reinterpret_cast<const float*>(reinterpret_cast<const char*>(p) + bytes); }

#if defined(__AVX512F__) && !defined(PARING_NARROW)
PARING_INLINE F keep(F a, const float* mask) { return _mm512_and_ps(a, load(mask)); }
#elif defined(__AVX2__)
PARING_INLINE F keep(F a, const float* mask) { return _mm256_and_ps(a, load(mask)); }
#else
typedef int32_t Bits __attribute__((vector_size(16)));
PARING_INLINE F keep(F a, const float* mask) { return F(Bits(a) & Bits(load(mask))); }
#endif

// The bounds come first: where a value is not a number both minimum and maximum give their second operand, so it stays one.
PARING_INLINE F finish(F a, F low, F high, const float* mask) {
  a = least(high, most(low, a));
  return mask ? keep(a, mask) : a;
}

// A block is N loads, 4 broadcasts and 4 * N multiply-adds.
template <int N> void conv4(const PlaneConv& c, const float* x, float* y, const float* start, const float* mask) {
  const F low = all(c.low), high = all(c.high);
  const int32_t* off = c.offsets;
  const float* w = c.values;
  const PlaneGroup* g = c.groups;
  for (int pass = 0; pass < c.passes; pass++)
    for (int k = 0; k < c.group_count; k++, g++) {
      float* out = y + size_t(g->output) * c.y_stride;
      if (c.far && pass == 0 && k + 1 < c.group_count) {
        const float* soon = y + size_t(g[1].output) * c.y_stride;
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++)
#pragma GCC unroll 8
          for (int j = 0; j < N; j++) __builtin_prefetch(soon + q * c.y_stride + j * width, 1);
        if (start)
#pragma GCC unroll 4
          for (int q = 0; q < 4; q++)
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) __builtin_prefetch(start + size_t(g[1].output + q) * c.start_stride + j * width);
      }
      F a[4][N];
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) a[q][j] = pass ? load(out + q * c.y_stride + j * width) : all(c.bias[g->output + q]);
      if (start && pass == 0) {
        const float* from = start + size_t(g->output) * c.start_stride;
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++)
#pragma GCC unroll 8
          for (int j = 0; j < N; j++) a[q][j] = add(a[q][j], load(from + q * c.start_stride + j * width));
      }
      for (const int32_t* end = c.offsets + g->end; off < end; off++, w += 4) {
        const float* p = at(x, *off);
        F v[N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) v[j] = load(p + j * width);
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
          F b = all(w[q]);
#pragma GCC unroll 8
          for (int j = 0; j < N; j++) a[q][j] = madd(b, v[j], a[q][j]);
        }
      }
      bool last = pass == c.passes - 1;
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++)
          store(out + q * c.y_stride + j * width, last ? finish(a[q][j], low, high, mask ? mask + j * width : nullptr) : a[q][j]);
    }
}

// A block is N loads, a broadcast and N multiply-adds. SETS blocks are in flight, each with its own sums, because a sum
// waits 4 cycles for the one before.
template <int N, int SETS> void conv1(const PlaneConv& c, const float* x, float* y, const float* start, const float* mask) {
  const F low = all(c.low), high = all(c.high);
  const int32_t* off = c.offsets;
  const float* w = c.values;
  const PlaneGroup* g = c.groups;
  const int32_t* source = c.sources;
  const float* from = x;
  for (int pass = 0; pass < c.passes; pass++) {
    if (source) {
      float* to = c.copies;
      for (const int32_t* end = c.sources + c.source_ends[pass]; source < end; source++, to += c.copy_stride)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) store(to + j * width, load(at(x, *source) + j * width));
      from = c.copies;
    }
    for (int k = 0; k < c.group_count; k++, g++) {
      float* out = y + size_t(g->output) * c.y_stride;
      if (c.far && pass == 0 && k + 4 < c.group_count) {
        const float* soon = y + size_t(g[4].output) * c.y_stride;
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) __builtin_prefetch(soon + j * width, 1);
        if (start)
#pragma GCC unroll 8
          for (int j = 0; j < N; j++) __builtin_prefetch(start + size_t(g[4].output) * c.start_stride + j * width);
      }
      F a[SETS][N];
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) a[0][j] = pass ? load(out + j * width) : all(c.bias[g->output]);
      if (start && pass == 0) {
        const float* begin = start + size_t(g->output) * c.start_stride;
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) a[0][j] = add(a[0][j], load(begin + j * width));
      }
#pragma GCC unroll 4
      for (int s = 1; s < SETS; s++)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) a[s][j] = all(0);
      const int32_t* end = c.offsets + g->end;
      for (; end - off >= SETS; off += SETS, w += SETS) {
#pragma GCC unroll 4
        for (int s = 0; s < SETS; s++) {
          const float* p = at(from, off[s]);
          F b = all(w[s]);
#pragma GCC unroll 8
          for (int j = 0; j < N; j++) a[s][j] = madd(b, load(p + j * width), a[s][j]);
        }
      }
      for (; off < end; off++, w++) {
        const float* p = at(from, *off);
        F b = all(*w);
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) a[0][j] = madd(b, load(p + j * width), a[0][j]);
      }
      bool last = pass == c.passes - 1;
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) {
        F r = a[0][j];
#pragma GCC unroll 4
        for (int s = 1; s < SETS; s++) r = add(r, a[s][j]);
        store(out + j * width, last ? finish(r, low, high, mask ? mask + j * width : nullptr) : r);
      }
    }
  }
}

using Conv = void (*)(const PlaneConv&, const float*, float*, const float*, const float*);
#if defined(__AVX512F__) && !defined(PARING_NARROW)
constexpr int block_vectors = 5, line_vectors = 5;   // an odd number of cache lines from channel to channel spreads them over the sets
const Conv conv1s[] = {nullptr, conv1<1, 4>, conv1<2, 4>, conv1<3, 4>, conv1<4, 2>, conv1<5, 2>};
const Conv conv4s[] = {nullptr, conv4<1>, conv4<2>, conv4<3>, conv4<4>, conv4<5>};
#else
constexpr int block_vectors = 3, line_vectors = 6;   // 16 registers: 12 sums, 3 loads, a broadcast
const Conv conv1s[] = {nullptr, conv1<1, 4>, conv1<2, 4>, conv1<3, 4>, conv1<4, 2>, conv1<5, 2>, conv1<6, 2>};
const Conv conv4s[] = {nullptr, conv4<1>, conv4<2>, conv4<3>};
#endif

// Runs of at most `most` vectors, of nearly equal length: a short last one would wait for its own sums.
void in_runs(const Conv* kernels, int most, const PlaneConv& c, int vectors) {
  int runs = (vectors + most - 1) / most;
  for (int i = 0, v = 0; i < runs; i++) {
    int n = vectors / runs + (i < vectors % runs);
    kernels[n](c, c.x + v * width, c.y + v * width, c.start ? c.start + v * width : nullptr, c.mask ? c.mask + v * width : nullptr);
    v += n;
  }
}
void conv4_tile(const PlaneConv& c, int vectors) { in_runs(conv4s, block_vectors, c, vectors); }
void conv1_tile(const PlaneConv& c, int vectors) { in_runs(conv1s, line_vectors, c, vectors); }

// TAPS: their number where it is known here, else 0. A run of N vectors has N sums in flight.
template <int TAPS, int N> PARING_INLINE void depthwise_run(const PlaneDepthwise& d, int taps, const float* x, const float* w, F bias, F low, F high,
                                                            float* y, const float* mask) {
  F a[N];
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) a[j] = bias;
#pragma GCC unroll 9
  for (int t = 0; t < (TAPS ? TAPS : taps); t++) {
    const float* p = at(x, d.offsets[t]);
    const F k = all(w[t]);
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) a[j] = madd(k, load(p + j * width), a[j]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) store(y + j * width, finish(a[j], low, high, mask ? mask + j * width : nullptr));
}

template <int TAPS> void depthwise_taps(const PlaneDepthwise& d, int vectors) {
  const F low = all(d.low), high = all(d.high);
  const int taps = TAPS ? TAPS : d.taps;
  for (int c = d.first; c < d.last; c++) {
    const float *x = d.x + size_t(c) * d.x_stride, *w = d.weights + size_t(c) * taps;
    float* y = d.y + size_t(c) * d.y_stride;
    const F bias = all(d.bias[c]);
    for (int v = 0; v < vectors;) {
      const int n = vectors - v;
      const float *p = x + v * width, *mask = d.mask ? d.mask + v * width : nullptr;
      float* q = y + v * width;
      if (n >= 5) { depthwise_run<TAPS, 5>(d, taps, p, w, bias, low, high, q, mask); v += 5; }
      else if (n == 4) { depthwise_run<TAPS, 4>(d, taps, p, w, bias, low, high, q, mask); v += 4; }
      else if (n == 3) { depthwise_run<TAPS, 3>(d, taps, p, w, bias, low, high, q, mask); v += 3; }
      else if (n == 2) { depthwise_run<TAPS, 2>(d, taps, p, w, bias, low, high, q, mask); v += 2; }
      else { depthwise_run<TAPS, 1>(d, taps, p, w, bias, low, high, q, mask); v += 1; }
    }
  }
}

// Every second float, and every `stride`th. Both may read `width` floats more than they give.
#if defined(__AVX512F__) && !defined(PARING_NARROW)
PARING_INLINE __m512i even_lanes() { return _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
PARING_INLINE F second(const float* p) { return _mm512_permutex2var_ps(load(p), even_lanes(), load(p + 16)); }
PARING_INLINE void both(const float* p, F* even, F* odd) {   // p[0], p[2] ...; p[1], p[3] ...
  F a = load(p), b = load(p + 16);
  *even = _mm512_permutex2var_ps(a, even_lanes(), b);
  *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(even_lanes(), _mm512_set1_epi32(1)), b);
}
#elif defined(__AVX2__)
PARING_INLINE F second(const float* p) {
  F t = _mm256_shuffle_ps(load(p), load(p + 8), 0x88);
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(t), 0xd8));
}
PARING_INLINE void both(const float* p, F* even, F* odd) {
  F a = load(p), b = load(p + 8);
  *even = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88)), 0xd8));
  *odd = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8));
}
#else
PARING_INLINE void both(const float* p, F* even, F* odd) { *even = F{p[0], p[2], p[4], p[6]}; *odd = F{p[1], p[3], p[5], p[7]}; }
PARING_INLINE F second(const float* p) { return F{p[0], p[2], p[4], p[6]}; }
#endif
PARING_INLINE F spaced(const float* p, int stride) {
  float t[width];
  for (int i = 0; i < width; i++) t[i] = p[ptrdiff_t(i) * stride];
  return load(t);
}

enum class Step { two_by_three, two, any };   // two_by_three: stride 2, nine taps in three runs of neighbours

template <Step STEP> void depthwise_rows(const PlaneDepthwise& d, int vectors) {
  const F low = all(d.low), high = all(d.high);
  const int taps = d.taps;
  for (int c = d.first; c < d.last; c++) {
    const float *x = d.x + size_t(c) * d.x_stride, *w = d.weights + size_t(c) * taps;
    float* y = d.y + size_t(c) * d.y_stride;
    const F bias = all(d.bias[c]);
    F k[9];
    if (STEP == Step::two_by_three)
#pragma GCC unroll 9
      for (int t = 0; t < 9; t++) k[t] = all(w[t]);
    for (int n = 0; n < d.row_count; n++) {
      const PlaneRow& r = d.rows[n];
      float* to = y + r.y;
      for (int i = 0; i < r.pixels; i += width) {
        F a = bias;
        if (STEP == Step::two_by_three) {
#pragma GCC unroll 3
          for (int t = 0; t < 9; t += 3) {
            const float* p = at(x, d.offsets[t]) + r.x + 2 * i;
            F even, odd;
            both(p, &even, &odd);
            a = madd(k[t], even, a);
            a = madd(k[t + 1], odd, a);
            a = madd(k[t + 2], second(p + 2), a);
          }
        } else {
          for (int t = 0; t < taps; t++) {
            const float* p = at(x, d.offsets[t]) + r.x + ptrdiff_t(i) * d.stride;
            a = madd(all(w[t]), STEP == Step::two ? second(p) : spaced(p, d.stride), a);
          }
        }
        a = finish(a, low, high, nullptr);
        // What is too much is written again, by what follows; masked stores take far longer.
        if (r.y + i + width <= vectors * width) store(to + i, a);
        else store_part(to + i, r.pixels - i, a);
      }
      for (int i = 0; i < r.after; i++) to[r.pixels + i] = 0;
    }
  }
}

void depthwise(const PlaneDepthwise& d, int vectors) {
  bool neighbours = d.taps == 9;
  for (int t = 0; neighbours && t < 9; t++) neighbours = d.offsets[t] == d.offsets[t / 3 * 3] + 4 * (t % 3);
  if (d.rows && d.stride == 2 && neighbours) depthwise_rows<Step::two_by_three>(d, vectors);
  else if (d.rows && d.stride == 2) depthwise_rows<Step::two>(d, vectors);
  else if (d.rows) depthwise_rows<Step::any>(d, vectors);
  else if (d.taps == 9) depthwise_taps<9>(d, vectors);
  else depthwise_taps<0>(d, vectors);
}

void add_planes(const PlaneAdd& s, int vectors) {
  const F low = all(s.low), high = all(s.high);
  for (int c = s.first; c < s.last; c++) {
    const float *a = s.a + size_t(c) * s.a_stride, *b = s.b + size_t(c) * s.b_stride;
    float* y = s.y + size_t(c) * s.y_stride;
    for (int v = 0; v < vectors; v++)
      store(y + v * width, finish(add(load(a + v * width), load(b + v * width)), low, high, s.mask ? s.mask + v * width : nullptr));
  }
}

// width x width floats
#if defined(__AVX512F__) && !defined(PARING_NARROW)
PARING_INLINE F low_pairs(F a, F b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); }
PARING_INLINE F high_pairs(F a, F b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); }
PARING_INLINE void transpose(F r[16]) {
  F t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {          // 4 x 4 floats inside each quarter
    F a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    F c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = low_pairs(a, c); t[i + 1] = high_pairs(a, c); t[i + 2] = low_pairs(b, d); t[i + 3] = high_pairs(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {              // then 4 x 4 quarters
    F a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    F c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    r[i] = _mm512_shuffle_f32x4(a, c, 0x88); r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88); r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
#elif defined(__AVX2__)
PARING_INLINE void transpose(F r[8]) {
  F t[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    F a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    F c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44); t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44); t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}
#else
PARING_INLINE void transpose(F r[4]) {
  F t[4];
  for (int i = 0; i < 4; i++) t[i] = F{r[0][i], r[1][i], r[2][i], r[3][i]};
  for (int i = 0; i < 4; i++) r[i] = t[i];
}
#endif

// Rows are many streams, more than the processor looks ahead in by itself. Floats.
constexpr int ahead = 64;

void to_planes(const float* rows, const int32_t* pixel, int channels, int first, int last, float* planes, size_t stride, int vectors) {
  for (int v = 0; v < vectors; v++, pixel += width, planes += width) {
    const bool full = pixel[0] >= 0 && pixel[width - 1] == pixel[0] + width - 1;   // no gap among them
    for (int c = first; c < last; c += width) {
      int n = last - c < width ? last - c : width;
      F r[width];
      if (n == width && full) {
        const float* p = rows + ptrdiff_t(pixel[0]) * channels + c;
#pragma GCC unroll 16
        for (int i = 0; i < width; i++) {
          const float* row = p + size_t(i) * size_t(channels);
          r[i] = load(row);
          __builtin_prefetch(row + ahead);
        }
        transpose(r);
        float* to = planes + size_t(c) * stride;
#pragma GCC unroll 16
        for (int i = 0; i < width; i++) store(to + size_t(i) * stride, r[i]);
        continue;
      }
      for (int i = 0; i < width; i++) {
        const float* p = rows + ptrdiff_t(pixel[i]) * channels + c;
        r[i] = pixel[i] < 0 ? all(0) : n == width ? load(p) : load_part(p, n);
      }
      transpose(r);
      for (int i = 0; i < n; i++) store(planes + size_t(c + i) * stride, r[i]);
    }
  }
}

void from_planes(const float* planes, size_t stride, const int32_t* pixel, int channels, int first, int last, float* rows, int vectors) {
  for (int v = 0; v < vectors; v++, pixel += width, planes += width)
    for (int c = first; c < last; c += width) {
      int n = last - c < width ? last - c : width;
      F r[width];
      for (int i = 0; i < width; i++) r[i] = i < n ? load(planes + size_t(c + i) * stride) : all(0);
      transpose(r);
      for (int i = 0; i < width; i++) {
        if (pixel[i] < 0) continue;
        float* p = rows + ptrdiff_t(pixel[i]) * channels + c;
        __builtin_prefetch(p + ahead, 1);
        if (n == width) store(p, r[i]);
        else store_part(p, n, r[i]);
      }
    }
}

// y[i] = x[i * stride]; reads no float behind the last one that counts. Writes some behind y[n], where `room` is for them.
PARING_INLINE void sample_row(const float* x, float* y, int n, int stride, [[maybe_unused]] int room) {
  int i = 0;
#if defined(__AVX512F__) && !defined(PARING_NARROW)
  if (stride == 2) {
    for (; i < n; i += 16) {
      int left = n - i < 16 ? n - i : 16, floats = 2 * left - 1;
      F a = load_part(x + 2 * i, floats < 16 ? floats : 16), b = floats > 16 ? load_part(x + 2 * i + 16, floats - 16) : all(0);
      F r = _mm512_permutex2var_ps(a, even_lanes(), b);
      if (i + 16 <= room) store(y + i, r);
      else store_part(y + i, left, r);
    }
    return;
  }
#elif defined(__AVX2__)
  if (stride == 2)
    for (; i + 9 <= n; i += 8) store(y + i, second(x + 2 * i));
#endif
  if (stride == 1)
    for (; i + width <= n; i += width) store(y + i, load(x + i));
  for (; i < n; i++) y[i] = x[ptrdiff_t(i) * stride];
}

void sample(const float* x, size_t x_stride, float* y, size_t y_stride, const PlaneRow* rows, int row_count, int first, int last, int stride, int vectors) {
  for (int c = first; c < last; c++) {
    const float* from = x + size_t(c) * x_stride;
    float* to = y + size_t(c) * y_stride;
    for (int k = 0; k < row_count; k++) {
      const PlaneRow& r = rows[k];
      float* p = to + r.y;
      for (int i = 0; i < r.before; i++) *p++ = 0;
      sample_row(from + r.x, p, r.pixels, stride, vectors * width - r.y - r.before);
      p += r.pixels;
      for (int i = 0; i < r.after; i++) *p++ = 0;
    }
  }
}

}  // namespace
}  // namespace PARING_TARGET

#define PARING_JOIN(a, b) a##b
#define PARING_TABLE(target) PARING_JOIN(planes_, target)
using namespace PARING_TARGET;
extern const PlaneKernels PARING_TABLE(PARING_TARGET) = {width, block_vectors, line_vectors, conv4_tile, conv1_tile,
                                                         depthwise, add_planes, to_planes, from_planes, sample};

}  // namespace paring
