#include "dense.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <ctime>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu.h"
#include "dense_kernels.h"
#include "pool.h"

namespace paring {
namespace {

// -- which kernels -----------------------------------------------------------------------------------------------------

const DenseTiles& float_tiles() {
  switch (isa_in_force()) {
#ifdef PARING_HAVE_avx512
    case Isa::avx512: case Isa::avx512vnni: return avx512::dense_tiles();
#endif
#ifdef PARING_HAVE_avx2
    case Isa::avx2: case Isa::avx2vnni: return avx2::dense_tiles();
#endif
    default: return portable::dense_tiles();
  }
}

const DenseRow& float_row() {
  switch (isa_in_force()) {
#ifdef PARING_HAVE_avx512
    case Isa::avx512: case Isa::avx512vnni: return avx512::dense_row();
#endif
#ifdef PARING_HAVE_avx2
    case Isa::avx2: case Isa::avx2vnni: return avx2::dense_row();
#endif
    default: return portable::dense_row();
  }
}

#ifdef PARING_HAVE_avx512bf16
double seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// Dot products of bfloat16 run at twice the rate of float32 on some processors (Zen 4), at half of it on others (Sapphire
// Rapids): a few microseconds tell, once. The ratio is far from 1 on both, so that noise does not decide.
bool pairs_are_faster() {
  static const bool faster = [] {
    const DenseTiles* both[] = {&avx512::dense_tiles(), &avx512bf16::dense_tiles()};
    alignas(64) static char panel[dense_rows * 1024], strip[64 << 10];
    alignas(64) static float sums[dense_rows * dense_columns];
    double best[2] = {1, 1};
    for (int turn = 0; turn < 16; turn++) {
      const DenseTiles& t = *both[turn & 1];
      int wide = t.widths - 1, rows = t.rows[wide];
      double start = seconds();
      t.tiles[wide][rows - 1](panel, strip, t.depth, nullptr, sums);
      best[turn & 1] = std::min(best[turn & 1], (seconds() - start) / t.depth);
    }
    return best[1] < best[0];
  }();
  return faster;
}
#endif

const DenseTiles& tiles_for(const paring_product& p) {
  // Pairs hold what is bfloat16 already, and blocks that are not worth a sum of their own are multiplied into floats.
#ifdef PARING_HAVE_avx512bf16
  bool fits = (p.round || p.x_bf16) && (!p.block_scale || (p.block % 2 == 0 && p.block >= 16));
  if (fits && bfloat16_dots_in_force() && pairs_are_faster()) return avx512bf16::dense_tiles();
#endif
  return float_tiles();
}

const DenseRow& row_for(const paring_product& p) {
#ifdef PARING_HAVE_avx512bf16
  if (p.bits == 4 && tiles_for(p).pairs) return avx512bf16::dense_row();
#endif
  return float_row();
}

// -- working memory ----------------------------------------------------------------------------------------------------

// A thread's own, kept for its next product: fresh memory costs more than many a product.
class Scratch {
 public:
  ~Scratch() { std::free(at_); }
  // Null where memory ran out.
  char* take(size_t bytes) {
    if (bytes > bytes_) {
      std::free(at_);
      at_ = nullptr, bytes_ = 0;
      if (posix_memalign(reinterpret_cast<void**>(&at_), 64, bytes)) at_ = nullptr;
      else bytes_ = bytes;
    }
    return at_;
  }

 private:
  char* at_ = nullptr;
  size_t bytes_ = 0;
};
thread_local Scratch scratch;

template <class T> T* piece(char*& at, size_t count) {
  T* here = reinterpret_cast<T*>(at);
  at += (count * sizeof(T) + 63) / 64 * 64;
  return here;
}

// Numbers below the least normal one are zero in every thread, whatever its caller has set: results must not depend on which
// thread computed them, and dot products of bfloat16 know no other way.
struct Flushing {
#if defined(__SSE2__)
  unsigned before = _mm_getcsr();
  Flushing() { _mm_setcsr(before | 0x8040); }
  ~Flushing() { _mm_setcsr(before); }
#endif
};

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// -- what both shapes of products share ----------------------------------------------------------------------------------

struct Product {
  const paring_product& p;
  const paring_product_conv* conv;
  int64_t m, k;

  const void* x(int64_t i) const { return static_cast<const char*>(p.x) + i * (p.x_bf16 ? 2 : 4); }
  void* y(int64_t m, int64_t n) const { return static_cast<char*>(p.y) + (m * p.y_row + n) * (p.y_bf16 ? 2 : 4); }
  const float* scale(int64_t n) const { return p.scale ? p.scale + n : nullptr; }
  int64_t block() const { return p.block_scale && p.block < k ? p.block : std::max<int64_t>(k, 1); }
  // k rows of weights before row `k`, from column n on; bytes between rows.
  const int8_t* w(int64_t k, int64_t n) const { return static_cast<const int8_t*>(p.w) + (p.bits == 4 ? k / 2 : k) * p.n + n; }
};

// Columns of a strip, the widest that `left` columns fill by more than half.
int width_for(const DenseTiles& t, int64_t left) {
  int i = t.widths - 1;
  while (i > 0 && left <= (int64_t(t.lanes) << i) * 3 / 4) i--;
  return i;
}

// Inputs [k0, k1) of row m of x as a row of a panel.
void panel_row(const Product& d, const DenseTiles& t, int64_t m, int64_t k0, int64_t k1, char* out) {
  const int size = t.pairs ? 2 : 4, round = d.p.round;
  if (!d.conv) {
    t.panel(d.x(m * d.p.x_row + k0), d.p.x_bf16, round, k1 - k0, out);
  } else {
    const paring_product_conv& c = *d.conv;
    int64_t image = m / c.out_w / c.out_h, line0 = m / c.out_w % c.out_h * c.stride_h - c.pad_top, column0 = m % c.out_w * c.stride_w - c.pad_left;
    for (int64_t k = k0; k < k1;) {
      int64_t tap = k / c.inputs, input = k % c.inputs, count = std::min(k1 - k, c.inputs - input);
      int64_t line = line0 + tap / c.kernel_w * c.dilation_h, column = column0 + tap % c.kernel_w * c.dilation_w;
      char* to = out + (k - k0) * size;
      if (line < 0 || line >= c.h || column < 0 || column >= c.w) std::memset(to, 0, size_t(count * size));
      else t.panel(d.x(((image * c.h + line) * c.w + column) * c.inputs + input), d.p.x_bf16, round, count, to);
      k += count;
    }
  }
  if (t.pairs && (k1 - k0) % 2) std::memset(out + (k1 - k0) * size, 0, size_t(size));
}

// -- several rows --------------------------------------------------------------------------------------------------------

constexpr int64_t most_rows = 96, most_columns = 512;   // of a task: its sums and panel stay in the second-level cache

struct Segment { int start, count; const float* scale; };   // of a strip's k: what shares block scales

struct Tiled {
  Product d;
  const DenseTiles& t;
  int64_t row_tasks, column_tasks;

  bool run(int64_t task) const {
    const paring_product& p = d.p;
    int64_t ti = task % row_tasks, tj = task / row_tasks, wide = int64_t(t.lanes) << (t.widths - 1), strips = up(p.n, wide);
    const int64_t m0 = d.m * ti / row_tasks, m1 = d.m * (ti + 1) / row_tasks, rows = m1 - m0;
    const int64_t n0 = strips * tj / column_tasks * wide, n1 = std::min(p.n, strips * (tj + 1) / column_tasks * wide);
    const int64_t columns = up(n1 - n0, wide) * wide, segments = t.pairs ? t.depth / 16 + 2 : 1;
    char* at = scratch.take(size_t(rows * t.panel_row + 4 * rows * columns + 5 * t.depth * wide + 4 * segments * wide + 5 * 64));
    if (!at) return false;
    Flushing flushing;
    char* panel = piece<char>(at, size_t(rows * t.panel_row));
    auto* sums = piece<float>(at, size_t(rows * columns));
    auto* strip = piece<float>(at, size_t(t.depth * wide));
    auto* stage = piece<int8_t>(at, size_t(t.depth * wide));
    auto* scales = piece<float>(at, size_t(segments * wide));
    std::memset(sums, 0, size_t(rows * columns) * 4);
    for (int64_t k0 = 0; k0 < d.k; k0 += t.depth) {
      const int64_t k1 = std::min(d.k, k0 + t.depth);
      for (int64_t m = m0; m < m1; m++) panel_row(d, t, m, k0, k1, panel + (m - m0) * t.panel_row);
      for (int64_t n = n0; n < n1;) {
        const int i = width_for(t, n1 - n), size = t.lanes << i;
        float* to = sums + (n - n0) * rows;
        Segment part[64];
        int parts = convert(k0, k1, n, size, stage, scales, strip, part);
        const int64_t tiles = up(rows, t.rows[i]);
        for (int64_t r = 0; r < tiles; r++) {
          const int64_t from = rows * r / tiles, count = rows * (r + 1) / tiles - from;
          for (int s = 0; s < parts; s++) {
            const char* x = panel + from * t.panel_row + part[s].start * (t.pairs ? 2 : 4);
            const char* w = reinterpret_cast<const char*>(strip) + int64_t(part[s].start) * size * (t.pairs ? 2 : 4);
            t.tiles[i][count - 1](x, w, part[s].count, part[s].scale, to + from * size);
          }
        }
        n += size;
      }
    }
    for (int64_t n = n0; n < n1;) {
      const int size = t.lanes << width_for(t, n1 - n);
      for (int64_t r = 0; r < rows; r++)
        t.finish(sums + (n - n0) * rows + r * size, d.scale(n), std::min<int64_t>(size, n1 - n), p.y_bf16, d.y(m0 + r, n));
      n += size;
    }
    return true;
  }

  // Weights [k0, k1) x [n, n + size) to a strip, with zeros behind the last column; gives the number of segments.
  int convert(int64_t k0, int64_t k1, int64_t n, int size, int8_t* stage, float* scales, float* strip, Segment* part) const {
    const paring_product& p = d.p;
    const int k = int(k1 - k0), there = int(std::min<int64_t>(size, p.n - n));
    const int8_t* w = d.w(k0, n);
    ptrdiff_t row = p.n;
    if (p.transposed) {
      t.turn(static_cast<const int8_t*>(p.w) + n * d.k + k0, d.k, k, there, size, stage);
      w = stage, row = size;
    } else if (there < size) {
      const int lines = p.bits == 4 ? (k + 1) / 2 : k;
      std::memset(stage, 0, size_t(lines) * size_t(size));
      for (int j = 0; j < lines; j++) std::memcpy(stage + j * size, w + j * row, size_t(there));
      w = stage, row = size;
    }
    part[0] = {0, k, nullptr};
    if (p.bits == 8) {
      t.strip8(w, row, k, size, strip);
      return 1;
    }
    const auto* codes = reinterpret_cast<const uint8_t*>(w);
    if (!p.block_scale) {
      t.strip4(codes, row, 0, k, size, nullptr, strip);
      return 1;
    }
    if (t.pairs) t.strip4(codes, row, 0, k, size, nullptr, strip);
    int parts = 0;
    for (int64_t j = k0; j < k1; parts++) {
      const int64_t b = j / d.block(), end = std::min(k1, (b + 1) * d.block());
      float* s = scales + (t.pairs ? parts * size : 0);
      t.halves(p.block_scale + b * p.n + n, there, s);
      std::fill(s + there, s + size, 0.0f);
      if (t.pairs) part[parts] = {int(j - k0), int(end - j), s};
      else t.strip4(codes + (j / 2 - k0 / 2) * row, row, int(j & 1), int(end - j), size, s, strip + (j - k0) * size);
      j = end;
    }
    return t.pairs ? parts : 1;
  }
};

int run_tiles(const Product& d, int threads) {
  const DenseTiles& t = tiles_for(d.p);
  const int64_t strips = up(d.p.n, int64_t(t.lanes) << (t.widths - 1)), wanted = threads > 1 ? threads * 3 : 1;
  int64_t rows = up(d.m, most_rows), columns = up(d.p.n, most_columns);
  if (rows * columns < wanted) columns = std::min(strips, up(wanted, rows));
  if (rows * columns < wanted) rows = std::min(up(d.m, dense_rows), up(wanted, columns));
  Tiled tiled = {d, t, rows, columns};
  std::atomic<bool> failed{false};
  parallel_for(threads, int(rows * columns), [&](int task) { if (!tiled.run(task)) failed = true; });
  return failed;
}

// -- one row ---------------------------------------------------------------------------------------------------------------

// Weights come from memory, and memory is fastest where neighbours are read one after the other. So tasks take all columns (up
// to what the caches hold of sums) of a range of k, and sums of the ranges are added up in the end: which ranges there are
// depends on the product alone, and so does the result. Weights [n][k] have that order within each column.
constexpr int64_t row_columns = 8192, row_bytes = 1 << 20, row_tasks = 16;
constexpr int64_t staged = 256;   // k of a copy of the last columns

struct OneRow {
  Product d;
  const DenseTiles& t;
  const DenseRow& r;
  const void* x;                  // floats, or bfloat16 where there is row4_pairs
  int64_t chunks, parts, unit;    // ranges of columns; ranges of k, in units
  float* sums;                    // [parts][stride]
  int64_t stride;

  bool run(int64_t task) const {
    const paring_product& p = d.p;
    const int64_t part = task % parts, chunk = task / parts, pieces = up(p.n, 64), units = up(d.k, unit);
    const int64_t n0 = pieces * chunk / chunks * 64, n1 = std::min(p.n, pieces * (chunk + 1) / chunks * 64), n = n1 - n0;
    Flushing flushing;
    float* to = sums + part * stride + n0;
    if (p.transposed) {
      r.dots(static_cast<const float*>(x), static_cast<const int8_t*>(p.w) + n0 * d.k, d.k, d.k, n, to);
      return true;
    }
    const int64_t room = up(n, 64) * 64, whole = n / r.lanes * r.lanes;
    char* at = scratch.take(size_t(4 * room + staged * r.lanes + 2 * 64));
    if (!at) return false;
    auto* scales = piece<float>(at, size_t(room));
    auto* stage = piece<int8_t>(at, size_t(staged * r.lanes));
    std::memset(to, 0, size_t(up(n, r.lanes) * r.lanes) * 4);
    const int64_t k1 = std::min(d.k, units * (part + 1) / parts * unit);
    for (int64_t k = units * part / parts * unit; k < k1;) {
      const int64_t b = k / d.block(), end = std::min(k1, (b + 1) * d.block());
      const float* s = nullptr;
      if (p.block_scale) {
        t.halves(p.block_scale + b * p.n + n0, n, scales);
        s = scales;
      }
      product(k, end, d.w(k, n0), p.n, int(whole), s, to);
      if (whole < n) {
        std::memset(stage, 0, size_t(staged * r.lanes));
        if (s) std::fill(scales + n, scales + whole + r.lanes, 0.0f);
        for (int64_t j = k; j < end;) {
          const int64_t stop = std::min(end, j / 2 * 2 + staged);
          const int64_t lines = p.bits == 4 ? up(stop, 2) - j / 2 : stop - j;
          for (int64_t i = 0; i < lines; i++) std::memcpy(stage + i * r.lanes, d.w(j, n0 + whole) + i * p.n, size_t(n - whole));
          product(j, stop, stage, r.lanes, r.lanes, s ? s + whole : s, to + whole);
          j = stop;
        }
      }
      k = end;
    }
    return true;
  }

  void product(int64_t k0, int64_t k1, const int8_t* w, ptrdiff_t row, int n, const float* scale, float* to) const {
    const auto* codes = reinterpret_cast<const uint8_t*>(w);
    if (r.row4_pairs) r.row4_pairs(static_cast<const uint16_t*>(x) + k0, codes, row, k1 - k0, n, scale, to);
    else if (d.p.bits == 4) r.row4(static_cast<const float*>(x) + k0, codes, row, int(k0 & 1), k1 - k0, n, scale, to);
    else r.row8(static_cast<const float*>(x) + k0, w, row, k1 - k0, n, to);
  }
};

int run_row(const Product& d, int threads) {
  const paring_product& p = d.p;
  const DenseRow& r = row_for(p);
  const DenseTiles& t = r.row4_pairs ? tiles_for(p) : float_tiles();
  OneRow one = {d, t, r, nullptr, 0, 1, 8, nullptr, up(p.n, 64) * 64};
  if (p.transposed) {
    one.chunks = std::min(up(p.n, 64), row_tasks);
  } else {
    one.chunks = up(p.n, row_columns);
    if (p.block_scale) one.unit = p.block % 2 ? 2 * p.block : p.block;
    one.parts = std::max<int64_t>(1, std::min({row_tasks / one.chunks, d.k * p.n * p.bits / 8 / row_bytes, up(d.k, one.unit)}));
  }
  static thread_local Scratch shared;   // not `scratch`: this thread has tasks of its own
  char* at = shared.take(size_t(4 * (d.k + 1 + one.parts * one.stride) + 2 * 64));
  if (!at) return 1;
  auto* x = piece<float>(at, size_t(d.k + 1));
  one.sums = piece<float>(at, size_t(one.parts * one.stride));
  t.panel(p.x, p.x_bf16, p.round, d.k, x);
  if (r.row4_pairs) reinterpret_cast<uint16_t*>(x)[d.k] = 0;
  one.x = x;
  std::atomic<bool> failed{false};
  parallel_for(threads, int(one.chunks * one.parts), [&](int task) { if (!one.run(task)) failed = true; });
  if (failed) return 1;
  Flushing flushing;
  for (int64_t part = 1; part < one.parts; part++)
    for (int64_t n = 0; n < p.n; n++) one.sums[n] += one.sums[part * one.stride + n];
  t.finish(one.sums, d.scale(0), p.n, p.y_bf16, p.y);
  return 0;
}

int run(const Product& d, int threads) {
  if (d.m <= 0 || d.p.n <= 0) return 0;
  // Waking another thread takes as long as some ten thousand products.
  double work = double(d.m) * double(d.p.n) * double(std::max<int64_t>(d.k, 1));
  threads = int(std::max(1.0, std::min(double(threads), work / (1 << 16))));
  return d.m == 1 && !d.conv ? run_row(d, threads) : run_tiles(d, threads);
}

}  // namespace
}  // namespace paring

int paring_product_run(const paring_product* p, int32_t threads) { return paring::run({*p, nullptr, p->m, p->k}, threads); }

int paring_product_conv_run(const paring_product_conv* c, int32_t threads) {
  return paring::run({c->p, c, int64_t(c->n) * c->out_h * c->out_w, int64_t(c->kernel_h) * c->kernel_w * c->inputs}, threads);
}
