#include "layer.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <sys/mman.h>

#include "cost.h"
#include "plan.h"

namespace paring {

Memory::Memory(size_t bytes) : bytes_(bytes) {
  constexpr size_t huge = size_t(2) << 20;
  bool large = bytes >= huge;
  size_t align = large ? huge : 64;
  at_ = static_cast<char*>(std::aligned_alloc(align, (bytes + align - 1) / align * align));
  if (!at_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (large) madvise(at_, (bytes + align - 1) / align * align, MADV_HUGEPAGE);
#endif
}
Memory::~Memory() { std::free(at_); }

const Kernel* kernel_of(Isa isa, int index) {
  KernelList f32 = portable::rows_f32(), int8 = portable::rows_int8();
  switch (isa) {
#ifdef PARING_HAVE_avx2
    case Isa::avx2: f32 = avx2::rows_f32(); int8 = avx2::rows_int8(); break;
#endif
#ifdef PARING_HAVE_avx2vnni
    case Isa::avx2vnni: f32 = avx2::rows_f32(); int8 = avx2vnni::rows_int8(); break;
#endif
#ifdef PARING_HAVE_avx512
    case Isa::avx512: f32 = avx512::rows_f32(); int8 = avx512::rows_int8(); break;
#endif
#ifdef PARING_HAVE_avx512vnni
    case Isa::avx512vnni: f32 = avx512::rows_f32(); int8 = avx512vnni::rows_int8(); break;
#endif
    default: break;
  }
  if (index < 0 || index >= f32.count + int8.count) return nullptr;
  return index < f32.count ? f32.rows + index : int8.rows + index - f32.count;
}

namespace {

template <class T> bool any(const T* w, int rows, size_t row_stride, int n) {
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < n; i++) if (w[r * row_stride + i] != T(0)) return true;
  return false;
}

// Calls f(group, tap, input, rows, inputs, first weight) for every block with a nonzero, in the order of kernels: passes
// of `pass` inputs, groups, taps, inputs.
template <class T, class F> void for_blocks(const paring_conv& c, int R, int I, int pass, F f) {
  const T* w = static_cast<const T*>(c.weights);
  int taps = c.kernel_h * c.kernel_w;
  size_t row = size_t(taps) * c.inputs;
  for (int first = 0; first < c.inputs; first += pass)
    for (int o = 0, g = 0; o < c.outputs; o += R, g++) {
      int rows = std::min(R, c.outputs - o);
      for (int t = 0; t < taps; t++)
        for (int i = first; i < std::min(c.inputs, first + pass); i += I) {
          int n = std::min(I, c.inputs - i);
          const T* at = w + o * row + size_t(t) * c.inputs + i;
          if (any(at, rows, row, n)) f(first / pass, g, t, i, rows, n, at);
        }
    }
}

std::string check(const paring_conv& c) {
  if (c.outputs < 1 || c.inputs < 1 || c.kernel_h < 1 || c.kernel_w < 1 || c.stride_h < 1 || c.stride_w < 1 || c.dilation_h < 1 || c.dilation_w < 1)
    return "a size below 1";
  if (c.kernel_h * c.kernel_w > 65535 || c.inputs > 65535) return "a kernel or channel count above 65535";
  size_t n = size_t(c.outputs) * c.kernel_h * c.kernel_w * c.inputs;
  if (c.type == PARING_F32) {
    const float* w = static_cast<const float*>(c.weights);
    for (size_t i = 0; i < n; i++) if (!std::isfinite(w[i])) return "weights with an infinity or not-a-number";
  } else {
    const int8_t* w = static_cast<const int8_t*>(c.weights);
    for (size_t i = 0; i < n; i++) if (w[i] == -128) return "int8 weights of -128, which the format does not allow";
    for (int i = 0; i < c.weight_scales; i++) if (!(c.weight_scale[i] > 0) || !std::isfinite(c.weight_scale[i])) return "a weight scale that is not a positive number";
    if (c.weight_scales != 1 && c.weight_scales != c.outputs) return "as many weight scales as there are outputs, or one";
    if (c.type == PARING_S8 && (!(c.x_scale > 0) || !(c.y_scale > 0))) return "an activation scale that is not a positive number";
  }
  return "";
}

void quantized(paring_layer& l, const paring_conv& c, int R) {
  const Kernel& k = *l.kernel;
  int padded = l.packed.groups * R, taps = c.kernel_h * c.kernel_w;
  int shift = k.order == Order::dot4 ? 128 : 0;
  l.scale.assign(padded, 1);
  l.bias.assign(padded, 0);
  l.sum.assign(padded, 0);
  const int8_t* w = static_cast<const int8_t*>(c.weights);
  for (int o = 0; o < c.outputs; o++) {
    int32_t sum = 0;
    for (size_t i = 0, n = size_t(taps) * c.inputs; i < n; i++) sum += w[o * n + i];
    float s = c.weight_scale[c.weight_scales > 1 ? o : 0];
    l.sum[o] = sum;
    if (c.type == PARING_S8) {
      l.scale[o] = c.x_scale * s / c.y_scale;
      l.bias[o] = int32_t(uint32_t(c.bias ? static_cast<const int32_t*>(c.bias)[o] : 0) - uint32_t(sum) * uint32_t(c.x_zero + shift));
    } else {
      l.scale[o] = s;
      float b = c.bias ? static_cast<const float*>(c.bias)[o] : 0;
      std::memcpy(&l.bias[o], &b, 4);
    }
  }
  Packed& p = l.packed;
  p.scale = l.scale.data();
  p.sum = l.sum.data();
  p.bias = l.bias.data();
  if (c.type == PARING_S8) {
    auto q = [&](float real, int32_t otherwise) {
      if (std::isinf(real)) return otherwise;
      float v = real / c.y_scale + float(c.y_zero);
      return int32_t(std::lrint(std::min(127.f, std::max(-128.f, v))));
    };
    p.zero = c.y_zero;
    p.least = q(c.low, -128);
    p.greatest = q(c.high, 127);
    p.small = 1;
    for (int o = 0; o < c.outputs; o++) if (l.scale[o] >= 1) p.small = 0;
  }
}

template <class T> void fill_values(paring_layer& l, const paring_conv& c, int R, int I, int pass, int64_t blocks) {
  const Kernel& k = *l.kernel;
  size_t row = size_t(c.kernel_h) * c.kernel_w * c.inputs;
  l.value = Memory(std::max<size_t>(1, size_t(blocks) * R * I * sizeof(T)) + 256);
  std::memset(l.value.get(), 0, l.value.bytes());
  T* out = reinterpret_cast<T*>(l.value.get());
  l.start.assign(size_t(l.packed.passes) * l.packed.groups + 1, 0);
  for_blocks<T>(c, R, I, pass, [&](int pass_index, int g, int t, int i, int rows, int n, const T* w) {
    l.start[size_t(pass_index) * l.packed.groups + g + 1]++;
    l.places.push_back({uint16_t(t), uint16_t(i / I)});
    for (int r = 0; r < rows; r++)
      for (int q = 0; q < n; q++) {
        size_t at = k.order == Order::dot4 ? size_t(r) * 4 + q : k.order == Order::dot2 ? size_t(q / 2) * R * 2 + r * 2 + q % 2 : size_t(r);
        out[at] = w[r * row + q];
        l.info.nonzeros += w[r * row + q] != T(0);
      }
    out += size_t(R) * I;
  });
  for (size_t i = 1; i < l.start.size(); i++) l.start[i] += l.start[i - 1];
  l.info.stored = blocks * R * I;
}

// Input channels whose part of a tile stays in the first-level cache, where sums can travel through the output.
int pass_inputs(const paring_conv& c, const Kernel& k) {
  if (c.type != PARING_F32) return c.inputs;
  int taps = c.kernel_h * c.kernel_w;
  // Neighbouring pixels share the taps of a line: k.pixels + kernel_w - 1 pixels on kernel_h lines. A flat tile can be
  // narrower, see tile_pixels.
  int64_t pixels = taps == 1 ? std::min(k.pixels, 16) : int64_t(k.pixels / c.stride_w + c.kernel_w) * c.kernel_h * std::min(c.stride_w, c.kernel_w);
  int64_t room = taps == 1 ? int64_t(caches().l1) / 2 : int64_t(caches().l1) * 7 / 8;
  int64_t most = std::max<int64_t>(16, room / (pixels * 4));
  if (most >= c.inputs) return c.inputs;
  int64_t passes = (c.inputs + most - 1) / most;
  return int((c.inputs + passes - 1) / passes + 15) / 16 * 16;
}

}  // namespace

int64_t count_blocks(const paring_conv& c, int R, int I) {
  int64_t n = 0;
  auto count = [&](auto type) { for_blocks<decltype(type)>(c, R, I, c.inputs, [&](int, int, int, int, int, int, auto) { n++; }); };
  if (c.type == PARING_F32) count(float()); else count(int8_t());
  return n;
}

static paring_layer* pack(const paring_conv& c, const char* name, int64_t positions, std::string* message) {
  *message = check(c);
  if (!message->empty()) return nullptr;
  std::unique_ptr<paring_layer> l(new paring_layer);
  l->conv = c;
  l->conv.weights = l->conv.bias = nullptr;
  l->conv.weight_scale = nullptr;
  Choice choice = choose(c, name, positions);
  if (!choice.kernel) { *message = choice.why; return nullptr; }
  const Kernel& k = *choice.kernel;
  l->kernel = &k;
  int R = k.outputs, I = k.inputs;
  l->packed.outputs = c.outputs;
  l->packed.groups = (c.outputs + R - 1) / R;
  l->packed.low = c.low;
  l->packed.high = c.high;
  l->pass_inputs = pass_inputs(c, k);
  l->packed.passes = (c.inputs + l->pass_inputs - 1) / l->pass_inputs;
  if (c.type == PARING_F32) fill_values<float>(*l, c, R, I, l->pass_inputs, choice.blocks);
  else fill_values<int8_t>(*l, c, R, I, c.inputs, choice.blocks);
  if (c.type == PARING_F32) {
    l->bias.assign(size_t(l->packed.groups) * R, 0);
    if (c.bias) std::memcpy(l->bias.data(), c.bias, size_t(c.outputs) * 4);
    l->packed.bias = l->bias.data();
  } else {
    quantized(*l, c, R);
  }
  l->packed.start = l->start.data();
  l->packed.value = l->value.get();
  if (c.kernel_h == 1 && c.kernel_w == 1) {
    for (auto& p : l->places) l->entry16.push_back(p.input);
    std::vector<paring_layer::Place>().swap(l->places);
  }
  l->info.kernel = k.name;
  l->info.block_outputs = R;
  l->info.block_inputs = I;
  l->info.bytes = int64_t(l->value.bytes() + l->entry16.size() * 2 + l->places.size() * 4 + l->start.size() * 4 + l->bias.size() * 4);
  return l.release();
}

}  // namespace paring

using namespace paring;

extern "C" {

paring_layer* paring_pack(const paring_conv* conv, const char* kernel, int64_t positions, char* message, size_t length) {
  std::string why;
  paring_layer* l = nullptr;
  try {
    l = pack(*conv, kernel, positions, &why);
  } catch (const std::bad_alloc&) {
    why = "out of memory";
  }
  if (!l && message && length) std::snprintf(message, length, "%s", why.c_str());
  return l;
}

void paring_layer_delete(paring_layer* l) { delete l; }
paring_layer_info paring_layer_describe(const paring_layer* l) { return l->info; }

int paring_kernel(int index, paring_kernel_info* out) {
  const Kernel* found = kernel_of(isa_in_force(), index);
  if (!found) return 0;
  const Kernel& k = *found;
  *out = {k.name, isa_name(k.isa), k.type, k.outputs, k.inputs};
  return 1;
}

const char* paring_isa(void) { return isa_name(isa_in_force()); }

int paring_set_isa(const char* name) {
  Isa isa;
  return name && isa_from_name(name, &isa) && set_isa(isa);
}

}  // extern "C"
