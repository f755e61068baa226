#include "plan.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <new>

#include "cost.h"
#include "pool.h"

namespace paring {
namespace {

void out_size(int size, int kernel, int stride, int dilation, bool same, int* out, int* before) {
  int reach = (kernel - 1) * dilation + 1;
  *out = same ? (size + stride - 1) / stride : size < reach ? 0 : (size - reach) / stride + 1;
  *before = same ? std::max(0, (*out - 1) * stride + reach - size) / 2 : 0;
}

TileFn tile(const paring_plan& p, int lines, int columns) { return p.layer->kernel->tiles[p.wide][lines - 1][columns - 1]; }

int pieces(int n, int most) { return (n + most - 1) / most; }
int piece_begin(int n, int count, int i) { return i * (n / count) + std::min(i, n % count); }

// Pixels of a tile, at most: float tiles take half of the first-level cache, the next one is on its way into the other.
int tile_pixels(const paring_layer& l, bool flat) {
  if (l.conv.type != PARING_F32 || !flat) return l.kernel->pixels;
  int64_t fit = int64_t(caches().l1) / 2 / (int64_t(l.pass_inputs) * 4);
  return int(std::min<int64_t>(l.kernel->pixels, std::max<int64_t>(fit, 12)));
}

// The next width for `left` pixels: nearly equal tiles, none of them left to wait for its own sums.
int next_width(const paring_plan& p, int most, int left) {
  int want = pieces(left, pieces(left, most));
  auto has = [&](int n) { return tile(p, 1, n) != nullptr; };
  if (has(want)) return want;
  if (left > most) { while (want < most && !has(want)) want++; while (!has(want)) want--; return want; }
  want = pieces(left, 2);
  while (!has(want)) want++;
  return std::min(want, left);
}

// Cuts the output into tiles of at most k.pixels, and these into ranges of groups where there would be too few tasks.
void cut(paring_plan& p) {
  const paring_layer& l = *p.layer;
  const bool flat = p.flat;
  int most = tile_pixels(l, flat);
  struct Tile2 { int image, line, column, lines, columns; };
  std::vector<Tile2> tiles;
  int images = flat ? 1 : p.n, rows = flat ? 1 : p.out_h, columns = flat ? p.n * p.out_h * p.out_w : p.out_w;
  for (int image = 0; image < images; image++)
    for (int line = 0; line < rows;) {
      int lines = columns <= most ? std::min({most_lines, most / columns, rows - line}) : 1;
      while (lines > 1 && !tile(p, lines, columns)) lines--;
      for (int c = 0; c < columns;) {
        int width = lines > 1 ? columns : next_width(p, most, columns - c);
        tiles.push_back({image, line, c, lines, width});
        c += width;
      }
      line += lines;
    }
  int groups = l.packed.groups, ranges = 1;
  if (p.threads > 1 && int(tiles.size()) < 4 * p.threads)
    ranges = std::max(1, std::min(pieces(4 * p.threads, int(tiles.size())), groups / 2));
  for (auto& t : tiles)
    for (int r = 0; r < ranges; r++)
      p.parts.push_back({t.image, t.line, t.column, t.lines, t.columns, piece_begin(groups, ranges, r), piece_begin(groups, ranges, r + 1)});
  bool spread = l.conv.type == PARING_F32 && p.apart != p.pixel;
  p.local = flat && (spread || (l.conv.type == PARING_S8 && ranges == 1));
}

bool bind(paring_plan& p) {
  const paring_layer& l = *p.layer;
  const paring_conv& c = l.conv;
  const Kernel& k = *l.kernel;
  out_size(p.h, c.kernel_h, c.stride_h, c.dilation_h, c.same, &p.out_h, &p.pad_top);
  out_size(p.w, c.kernel_w, c.stride_w, c.dilation_w, c.same, &p.out_w, &p.pad_left);
  if (p.n < 1 || p.out_h < 1 || p.out_w < 1) return false;
  if (int64_t(p.n) * p.h * p.w > INT_MAX / 2 || int64_t(p.n) * p.out_h * p.out_w > INT_MAX / 2) return false;
  const bool point = c.kernel_h == 1 && c.kernel_w == 1, flat = p.flat = point && c.stride_h == 1 && c.stride_w == 1;
  p.pixel = c.type == PARING_F32 ? size_t(c.inputs) * 4 : size_t(c.inputs + 3) / 4 * k.unit;
  int need_h = (p.out_h - 1) * c.stride_h + (c.kernel_h - 1) * c.dilation_h + 1, need_w = (p.out_w - 1) * c.stride_w + (c.kernel_w - 1) * c.dilation_w + 1;
  bool padded = need_h > p.h || need_w > p.w;
  // Pixels a power of two apart share a few sets of the cache, where passes over the inputs leave no other to use.
  bool crowded = c.type == PARING_F32 && l.packed.passes > 1 && p.pixel % 1024 == 0;
  p.apart = p.pixel + (crowded && (flat || !point) ? 64 : 0);
  if (!flat && (padded || c.type != PARING_F32 || (crowded && !point))) { p.padded_h = need_h; p.padded_w = need_w; }
  int pitch = p.padded_w ? p.padded_w : p.w;
  if (point) {
    p.entry = l.entry16.data();
  } else {
    p.wide = true;
    p.entry32.reserve(l.places.size());
    for (auto& at : l.places) {
      int64_t offset = (int64_t(at.tap / c.kernel_w) * c.dilation_h * pitch + int64_t(at.tap % c.kernel_w) * c.dilation_w) * int64_t(p.apart) + int64_t(at.input) * k.unit;
      if (offset > INT_MAX) return false;
      p.entry32.push_back(int32_t(offset));
    }
    p.entry = p.entry32.data();
  }
  cut(p);
  if (c.type == PARING_QD8) {
    p.pixel_inverse.resize(size_t(p.n) * p.out_h * p.out_w);
    p.pixel_zero.resize(p.pixel_inverse.size());
    p.inverse.resize(p.n);
    p.zero.resize(p.n);
    if (p.padded_w) {
      p.quantized = Memory(size_t(p.n) * p.h * p.w * p.pixel + 64);
      std::memset(p.quantized.get(), 0, p.quantized.bytes());
    }
  }
  if (p.padded_w) {
    p.copy_image = p.apart * p.padded_h * p.padded_w;
    p.copy = Memory(p.copy_image * p.n + 64);
    std::memset(p.copy.get(), 0, p.copy.bytes());
  } else if (c.type != PARING_F32) {
    p.copy_image = p.pixel * p.h * p.w;
    p.copy = Memory(p.local ? 64 : p.copy_image * p.n + 64);
    std::memset(p.copy.get(), 0, p.copy.bytes());
  }
  return true;
}

// Pixels side by side to pixels `apart`.
void spread(const paring_plan& p, const char* x, int count, char* out) {
  if (p.apart == p.pixel) { std::memcpy(out, x, size_t(count) * p.pixel); return; }
  for (int i = 0; i < count; i++) std::memcpy(out + i * p.apart, x + i * p.pixel, p.pixel);
}

// One line of the padded copy. `quantized`: the line as integers already (qd8), else it is widened or copied from x.
void fill_line(const paring_plan& p, int image, int line, const void* x, const char* quantized, int32_t zero, char* out) {
  const paring_conv& c = p.layer->conv;
  const Kernel& k = *p.layer->kernel;
  int source = line - p.pad_top;
  int first = p.pad_left, last = std::min(p.padded_w, p.pad_left + p.w);   // columns with data
  auto pad = [&](int from, int to) {
    char* at = out + size_t(from) * p.pixel;
    size_t bytes = size_t(to - from) * p.pixel;
    if (c.type == PARING_F32) return;             // zeros from the start
    if (k.order == Order::dot4) std::memset(at, zero + 128, bytes);
    else std::fill_n(reinterpret_cast<int16_t*>(at), bytes / 2, int16_t(zero));
  };
  if (source < 0 || source >= p.h) { pad(0, p.padded_w); return; }
  pad(0, std::min(first, p.padded_w));
  if (last < p.padded_w) pad(last, p.padded_w);
  char* to = out + size_t(first) * p.apart;
  int count = last - first;
  size_t row = (size_t(image) * p.h + source) * p.w;
  if (c.type == PARING_F32) spread(p, static_cast<const char*>(x) + row * p.pixel, count, to);
  else if (quantized) std::memcpy(to, quantized + row * p.pixel, size_t(count) * p.pixel);
  else if (c.inputs % 4 == 0) k.widen(static_cast<const int8_t*>(x) + row * c.inputs, count * c.inputs, to);
  else for (int i = 0; i < count; i++) k.widen(static_cast<const int8_t*>(x) + (row + i) * c.inputs, c.inputs, to + i * p.pixel);
}

// Quantizes image `i` of float activations. Rows whose length is no multiple of 4 are padded, pixel by pixel.
void quantize_image(paring_plan& p, int i, const float* x, char* out) {
  const paring_conv& c = p.layer->conv;
  const Kernel& k = *p.layer->kernel;
  int64_t pixels = int64_t(p.h) * p.w, n = pixels * c.inputs;
  if (c.inputs % 4 == 0 || pixels == 1) {
    k.quantize(x, n, out, &p.inverse[i], &p.zero[i]);
    return;
  }
  std::vector<char> flat(size_t(n + 4) * 2);
  k.quantize(x, n, flat.data(), &p.inverse[i], &p.zero[i]);
  int bytes = k.unit / 4;
  for (int64_t q = 0; q < pixels; q++) std::memcpy(out + q * p.pixel, flat.data() + q * c.inputs * bytes, size_t(c.inputs) * bytes);
}

void run(paring_plan& p, const void* x, void* y) {
  const paring_layer& l = *p.layer;
  const paring_conv& c = l.conv;
  const Kernel& k = *l.kernel;
  size_t y_pixel = size_t(c.outputs) * (c.type == PARING_S8 ? 1 : 4);
  const char* from = static_cast<const char*>(x);
  size_t image_bytes = size_t(p.h) * p.w * p.pixel;
  if (c.type == PARING_QD8) {
    char* to = p.padded_w ? p.quantized.get() : p.copy.get();
    int64_t in = int64_t(p.h) * p.w * c.inputs;
    int per = std::max(1, int(4096 / std::max<int64_t>(1, in)));   // images of a task
    parallel_for(p.threads, pieces(p.n, per), [&](int t) {
      for (int i = t * per; i < std::min(p.n, (t + 1) * per); i++) {
        quantize_image(p, i, static_cast<const float*>(x) + i * in, to + size_t(i) * image_bytes);
        size_t pixels = size_t(p.out_h) * p.out_w;
        std::fill_n(&p.pixel_inverse[i * pixels], pixels, p.inverse[i]);
        std::fill_n(&p.pixel_zero[i * pixels], pixels, p.zero[i]);
      }
    });
    from = p.copy.get();
  }
  if (p.padded_w) {
    int lines = p.n * p.padded_h, per = 4;
    parallel_for(p.threads, pieces(lines, per), [&](int t) {
      for (int i = t * per; i < std::min(lines, (t + 1) * per); i++) {
        int image = i / p.padded_h, line = i % p.padded_h;
        int32_t zero = c.type == PARING_QD8 ? p.zero[image] : c.x_zero;
        fill_line(p, image, line, x, p.quantized.get(), zero, p.copy.get() + image * p.copy_image + size_t(line) * p.padded_w * p.apart);
      }
    });
    from = p.copy.get();
  } else if (c.type == PARING_S8 && !p.local) {
    int pixels = p.n * p.h * p.w, per = std::max(1, 8192 / c.inputs);
    parallel_for(p.threads, pieces(pixels, per), [&](int t) {
      for (int i = t * per; i < std::min(pixels, (t + 1) * per); i++)
        k.widen(static_cast<const int8_t*>(x) + size_t(i) * c.inputs, c.inputs, p.copy.get() + i * p.pixel);
    });
    from = p.copy.get();
  }
  const bool flat = p.flat;
  int pitch = p.padded_w ? p.padded_w : p.w, height = p.padded_w ? p.padded_h : p.h;
  parallel_for(p.threads, int(p.parts.size()), [&](int i) {
    const paring_plan::Part& part = p.parts[i];
    Tile t = {};
    t.w = &l.packed;
    t.entry = p.entry;
    t.first = part.first;
    t.last = part.last;
    size_t pixel = flat ? size_t(part.column) : (size_t(part.image) * height + size_t(part.line) * c.stride_h) * pitch + size_t(part.column) * c.stride_w;
    size_t out = flat ? size_t(part.column) : (size_t(part.image) * p.out_h + part.line) * p.out_w + part.column;
    t.x = from + pixel * (p.padded_w ? p.apart : p.pixel);
    if (p.local) {
      thread_local std::vector<char> mine;
      mine.resize(part.columns * p.apart + 128);
      char* to = mine.data() + (64 - reinterpret_cast<uintptr_t>(mine.data()) % 64) % 64;
      const int8_t* source = static_cast<const int8_t*>(x) + pixel * c.inputs;
      if (c.type == PARING_F32) spread(p, t.x, part.columns, to);
      else if (c.inputs % 4 == 0) k.widen(source, part.columns * c.inputs, to);
      else for (int j = 0; j < part.columns; j++) k.widen(source + size_t(j) * c.inputs, c.inputs, to + j * p.pixel);
      t.x = to;
    }
    t.step = ptrdiff_t(p.apart) * c.stride_w;
    t.line = ptrdiff_t(p.apart) * pitch * c.stride_h;
    t.y = static_cast<char*>(y) + out * y_pixel;
    t.y_step = ptrdiff_t(y_pixel);
    t.y_line = ptrdiff_t(y_pixel) * p.out_w;
    if (c.type == PARING_QD8) {
      t.inverse = &p.pixel_inverse[out];
      t.zero = &p.pixel_zero[out];
      t.quant_line = p.out_w;
    }
    if (flat && !p.local && part.last == l.packed.groups && i + 1 < int(p.parts.size())) {
      t.ahead = t.x + part.columns * p.pixel;
      t.ahead_bytes = int32_t(p.parts[i + 1].columns * p.pixel);
    }
    tile(p, part.lines, part.columns)(t);
  });
}

}  // namespace
}  // namespace paring

using namespace paring;

extern "C" {

void paring_output_shape(const paring_conv* c, int32_t h, int32_t w, int32_t* out_h, int32_t* out_w) {
  int before;
  out_size(h, c->kernel_h, c->stride_h, c->dilation_h, c->same, out_h, &before);
  out_size(w, c->kernel_w, c->stride_w, c->dilation_w, c->same, out_w, &before);
}

paring_plan* paring_plan_new(const paring_layer* layer, int32_t n, int32_t h, int32_t w, int32_t threads) {
  try {
    std::unique_ptr<paring_plan> p(new paring_plan{});
    p->layer = layer;
    p->n = n;
    p->h = h;
    p->w = w;
    p->threads = threads > 1 && paring_estimate(layer, n, h, w, 1) >= worth_threads ? threads : 1;
    return bind(*p) ? p.release() : nullptr;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void paring_plan_delete(paring_plan* p) { delete p; }
void paring_run(paring_plan* p, const void* x, void* y) { run(*p, x, y); }

}  // extern "C"
