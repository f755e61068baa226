// A stand-in for the LiteRT runtime, as far as a delegate sees it: tensors, nodes, a plan, partitions, and slow kernels of
// its own for what the delegate leaves. For tests of the delegate without LiteRT.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "abi.h"

namespace fake {
using namespace paring::litert;

constexpr int kNegate = 59;   // what stands between products, so that there are several partitions

inline TfLiteIntArray* array(const std::vector<int>& v) {
  auto* a = static_cast<TfLiteIntArray*>(std::malloc(4 * (v.size() + 1)));
  a->size = int(v.size());
  std::copy(v.begin(), v.end(), a->data);
  return a;
}

class Runtime {
 public:
  Runtime() {
    context.implementation = this;
    context.GetExecutionPlan = [](TfLiteContext* c, TfLiteIntArray** plan) { return of(c).give_plan(plan); };
    context.ResizeTensor = [](TfLiteContext*, TfLiteTensor* t, TfLiteIntArray* dims) {
      std::free(t->dims);
      t->dims = dims;
      t->bytes = count(*t) * size(t->type);
      return kOk;
    };
    context.ReportError = report;
    context.AddTensors = [](TfLiteContext*, int, int*) { return kError; };
    context.GetNodeAndRegistration = [](TfLiteContext* c, int n, TfLiteNode** node, TfLiteRegistration** r) {
      Runtime& self = of(c);
      if (n < 0 || size_t(n) >= self.nodes.size()) return kError;
      *node = &self.nodes[size_t(n)]->node, *r = &self.nodes[size_t(n)]->registration;
      return kOk;
    };
    context.ReplaceNodeSubsetsWithDelegateKernels = [](TfLiteContext* c, TfLiteRegistration r, const TfLiteIntArray* nodes, TfLiteDelegate* d) {
      return of(c).replace(r, nodes, d);
    };
    context.recommended_num_threads = 1;
  }
  ~Runtime() {
    for (auto& n : nodes) {
      if (n->registration.free) n->registration.free(&context, n->node.user_data);
      std::free(n->node.inputs), std::free(n->node.outputs);
    }
    for (auto& t : tensors) std::free(t.dims);
    std::free(plan_copy_);
  }
  Runtime(const Runtime&) = delete;

  // -- building -------------------------------------------------------------------------------------------------------

  int tensor(TfLiteType type, const std::vector<int>& dims, const void* data = nullptr, size_t bytes = 0) {
    TfLiteTensor t = {};
    t.type = type, t.dims = array(dims), t.name = "tensor";
    t.allocation_type = data ? kMappedConstant : kArena;
    t.data = const_cast<void*>(data);
    t.bytes = bytes ? bytes : count(t) * size(type);
    tensors.push_back(t);
    context.tensors = tensors.data(), context.tensors_size = tensors.size();
    return int(tensors.size()) - 1;
  }
  // A grid: one scale, or one per channel of `axis`.
  void grid(int t, const std::vector<float>& scale, int zero, int axis = 0) {
    grids_.emplace_back();
    Grid& g = grids_.back();
    g.scale.resize(scale.size() + 1), g.zero.assign(scale.size() + 1, zero);
    int n = int(scale.size());
    memcpy(&g.scale[0], &n, 4);
    std::copy(scale.begin(), scale.end(), g.scale.begin() + 1);
    g.zero[0] = n;
    g.affine = {reinterpret_cast<TfLiteFloatArray*>(g.scale.data()), reinterpret_cast<TfLiteIntArray*>(g.zero.data()), axis};
    tensors[size_t(t)].quantization = {1, &g.affine};
    if (n == 1) tensors[size_t(t)].params = {scale[0], zero};
  }
  int node(int code, const std::vector<int>& inputs, const std::vector<int>& outputs, const void* options, const TfLiteRegistration* r = nullptr) {
    auto n = std::make_unique<Entry>();
    n->node = {array(inputs), array(outputs), nullptr, nullptr, nullptr, const_cast<void*>(options)};
    n->registration = r ? *r : TfLiteRegistration{};
    n->registration.builtin_code = code, n->registration.version = 1;
    nodes.push_back(std::move(n));
    return int(nodes.size()) - 1;
  }
  int op(int code, const std::vector<int>& inputs, const std::vector<int>& outputs, const void* options) {
    plan.push_back(node(code, inputs, outputs, options));
    return plan.back();
  }

  // -- running --------------------------------------------------------------------------------------------------------

  TfLiteStatus apply(TfLiteDelegate* d) { return d->Prepare(&context, d); }

  bool allocate() {
    for (auto& t : tensors)
      if (t.allocation_type == kArena) t.data = nullptr;
    arena_.clear();
    for (int t : inputs) reserve(t);
    for (int n : plan) {
      Entry& e = *nodes[size_t(n)];
      if (e.registration.prepare) {
        if (e.registration.prepare(&context, &e.node) != kOk) return false;
      } else {
        shape(e);
      }
      for (int i = 0; i < e.node.outputs->size; i++) reserve(e.node.outputs->data[i]);
    }
    return true;
  }
  bool invoke() {
    for (int n : plan) {
      Entry& e = *nodes[size_t(n)];
      if (e.registration.invoke) {
        if (e.registration.invoke(&context, &e.node) != kOk) return false;
      } else {
        compute(e);
      }
    }
    return true;
  }
  int claimed() const {
    return int(std::count_if(plan.begin(), plan.end(), [&](int n) { return nodes[size_t(n)]->registration.invoke != nullptr; }));
  }
  TfLiteTensor& at(int t) { return tensors[size_t(t)]; }
  void resize(int t, const std::vector<int>& dims) { context.ResizeTensor(&context, &at(t), array(dims)); }

  struct Entry { TfLiteNode node; TfLiteRegistration registration; std::unique_ptr<TfLiteDelegateParams> params; std::vector<TfLiteIntArray*> own;
    ~Entry() { for (auto* a : own) std::free(a); } };
  TfLiteContext context = {};
  std::vector<TfLiteTensor> tensors;
  std::vector<std::unique_ptr<Entry>> nodes;
  std::vector<int> plan, inputs, outputs;
  std::string error;

  static size_t count(const TfLiteTensor& t) {
    size_t n = 1;
    for (int i = 0; i < t.dims->size; i++) n *= size_t(t.dims->data[i]);
    return n;
  }
  static size_t size(TfLiteType t) { return t == kInt8 ? 1 : t == kFloat16 ? 2 : 4; }

 private:
  struct Grid { std::vector<float> scale; std::vector<int> zero; TfLiteAffine affine; };
  static Runtime& of(TfLiteContext* c) { return *static_cast<Runtime*>(c->implementation); }

  static void report(TfLiteContext* c, const char* format, ...) {
    char buffer[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    of(c).error += buffer;
  }

  TfLiteStatus give_plan(TfLiteIntArray** out) {
    std::free(plan_copy_);
    *out = plan_copy_ = array(plan);
    return kOk;
  }

  void reserve(int t) {
    TfLiteTensor& x = at(t);
    if (x.allocation_type != kArena) return;
    arena_.emplace_back(new char[x.bytes + 1]);   // exact, so that a sanitizer sees what is read behind it
    x.data = x.bytes ? arena_.back().get() : nullptr;
  }

  // Turn by turn all nodes that are ready and of one kind, as the runtime does.
  TfLiteStatus replace(TfLiteRegistration r, const TfLiteIntArray* chosen, TfLiteDelegate* d) {
    auto is_chosen = [&](int n) { return std::count(chosen->data, chosen->data + chosen->size, n) > 0; };
    std::vector<int> left = plan, made;
    std::vector<std::pair<bool, std::vector<int>>> turns;
    auto produced = [&](int t) {
      for (int n : plan) for (int i = 0; i < nodes[size_t(n)]->node.outputs->size; i++) if (nodes[size_t(n)]->node.outputs->data[i] == t) return true;
      return false;
    };
    auto ready = [&](int n) {
      const TfLiteIntArray* in = nodes[size_t(n)]->node.inputs;
      for (int i = 0; i < in->size; i++) if (in->data[i] >= 0 && produced(in->data[i]) && !std::count(made.begin(), made.end(), in->data[i])) return false;
      return true;
    };
    while (!left.empty()) {
      turns.emplace_back(false, std::vector<int>());
      bool any = false;
      for (bool again = true; again;) {
        again = false;
        for (size_t i = 0; i < left.size(); i++) {
          int n = left[i];
          if (!ready(n) || (any && is_chosen(n) != turns.back().first)) continue;
          if (!any) turns.back().first = is_chosen(n), any = true;
          turns.back().second.push_back(n);
          for (int k = 0; k < nodes[size_t(n)]->node.outputs->size; k++) made.push_back(nodes[size_t(n)]->node.outputs->data[k]);
          left.erase(left.begin() + std::ptrdiff_t(i));
          again = true;
          break;
        }
      }
      if (!any) return kError;
    }
    std::vector<int> old = plan;
    plan.clear();
    for (auto& turn : turns) {
      if (!turn.first) {
        plan.insert(plan.end(), turn.second.begin(), turn.second.end());
        continue;
      }
      auto inside = [&](int n) { return std::count(turn.second.begin(), turn.second.end(), n) > 0; };
      std::vector<int> in, out, here;
      for (int n : turn.second) for (int k = 0; k < nodes[size_t(n)]->node.outputs->size; k++) here.push_back(nodes[size_t(n)]->node.outputs->data[k]);
      auto add = [](std::vector<int>& v, int t) { if (!std::count(v.begin(), v.end(), t)) v.push_back(t); };
      for (int n : turn.second) for (int k = 0; k < nodes[size_t(n)]->node.inputs->size; k++) {
        int t = nodes[size_t(n)]->node.inputs->data[k];
        if (t >= 0 && !std::count(here.begin(), here.end(), t)) add(in, t);
      }
      for (int t : here) {
        bool leaves = std::count(outputs.begin(), outputs.end(), t) > 0;
        for (int n : old) if (!inside(n)) for (int k = 0; k < nodes[size_t(n)]->node.inputs->size; k++) leaves |= nodes[size_t(n)]->node.inputs->data[k] == t;
        if (leaves) add(out, t);
      }
      int n = node(51, in, out, nullptr, &r);
      Entry& e = *nodes[size_t(n)];
      e.own = {array(turn.second), array(in), array(out)};
      e.params.reset(new TfLiteDelegateParams{d, e.own[0], e.own[1], e.own[2]});
      e.node.user_data = r.init(&context, reinterpret_cast<const char*>(e.params.get()), 0);
      plan.push_back(n);
    }
    return kOk;
  }

  // -- slow kernels ---------------------------------------------------------------------------------------------------

  static int out_size(int x, int kernel, int stride, int dilation, bool same) {
    int reach = (kernel - 1) * dilation + 1;
    return same ? (x + stride - 1) / stride : (x - reach) / stride + 1;
  }
  void shape(Entry& e) {
    int x = e.node.inputs->data[0], y = e.node.outputs->data[0];
    std::vector<int> d(at(x).dims->data, at(x).dims->data + at(x).dims->size);
    if (e.registration.builtin_code == kFullyConnected) {
      const TfLiteTensor& w = at(e.node.inputs->data[1]);
      d = {int(count(at(x))) / w.dims->data[1], w.dims->data[0]};
    } else if (e.registration.builtin_code == kConv2d) {
      auto* o = static_cast<const TfLiteConvParams*>(e.node.builtin_data);
      const int* w = at(e.node.inputs->data[1]).dims->data;
      d = {d[0], out_size(d[1], w[1], o->stride_h, o->dilation_h, o->padding == kSame), out_size(d[2], w[2], o->stride_w, o->dilation_w, o->padding == kSame), w[0]};
    }
    resize(y, d);
  }

  void compute(Entry& e) {
    TfLiteTensor &x = at(e.node.inputs->data[0]), &y = at(e.node.outputs->data[0]);
    switch (e.registration.builtin_code) {
      case kNegate:
        for (size_t i = 0; i < count(x); i++) {
          if (x.type == kInt8) static_cast<int8_t*>(y.data)[i] = int8_t(-std::max<int>(-127, static_cast<int8_t*>(x.data)[i]));
          else static_cast<float*>(y.data)[i] = -static_cast<float*>(x.data)[i];
        }
        break;
      case kDequantize:
        for (size_t i = 0; i < count(x); i++) {
          int h = static_cast<uint16_t*>(x.data)[i];
          float v = h & 0x7c00 ? std::ldexp(float((h & 1023) | 1024), (h >> 10 & 31) - 25) : std::ldexp(float(h & 1023), -24);
          static_cast<float*>(y.data)[i] = h & 0x8000 ? -v : v;
        }
        break;
      case kDensify: {   // rows dense, columns compressed: the only encoding that these tests write
        const TfLiteLevel& l = x.sparsity->levels[x.sparsity->level_count - 1];
        memset(y.data, 0, y.bytes);
        size_t columns = size_t(x.dims->data[x.dims->size - 1]), n = size(x.type);
        for (int r = 0; r + 1 < l.segments->size; r++)
          for (int k = l.segments->data[r]; k < l.segments->data[r + 1]; k++)
            memcpy(static_cast<char*>(y.data) + (size_t(r) * columns + size_t(l.indices->data[k])) * n, static_cast<char*>(x.data) + size_t(k) * n, n);
        break;
      }
      default: product(e);
    }
  }

  // FULLY_CONNECTED as a 1x1 convolution of a row of pixels.
  void product(Entry& e) {
    TfLiteTensor &x = at(e.node.inputs->data[0]), &w = at(e.node.inputs->data[1]), &y = at(e.node.outputs->data[0]);
    TfLiteTensor* b = e.node.inputs->size > 2 && e.node.inputs->data[2] >= 0 ? &at(e.node.inputs->data[2]) : nullptr;
    bool dense = e.registration.builtin_code == kFullyConnected;
    TfLiteConvParams o = {kValid, 1, 1, kNoActivation, 1, 1, 0};
    if (dense) o.activation = static_cast<const TfLiteFullyConnectedParams*>(e.node.builtin_data)->activation;
    else o = *static_cast<const TfLiteConvParams*>(e.node.builtin_data);
    int inputs = w.dims->data[w.dims->size - 1], outputs = w.dims->data[0], kh = dense ? 1 : w.dims->data[1], kw = dense ? 1 : w.dims->data[2];
    int n = dense ? int(count(x)) / inputs : x.dims->data[0], h = dense ? 1 : x.dims->data[1], wide = dense ? 1 : x.dims->data[2];
    int oh = dense ? 1 : y.dims->data[1], ow = dense ? 1 : y.dims->data[2];
    bool same = o.padding == kSame;
    int top = same ? std::max(0, (oh - 1) * o.stride_h + (kh - 1) * o.dilation_h + 1 - h) / 2 : 0;
    int left = same ? std::max(0, (ow - 1) * o.stride_w + (kw - 1) * o.dilation_w + 1 - wide) / 2 : 0;
    size_t image = size_t(h) * size_t(wide) * size_t(inputs);
    auto* grid = w.quantization.type == 1 ? static_cast<TfLiteAffine*>(w.quantization.params)->scale : nullptr;
    for (int i = 0; i < n; i++) {
      // Integer products: x as integers minus their zero point, exact.
      std::vector<double> in(image);
      double x_scale = x.params.scale;
      for (size_t k = 0; k < image; k++)
        in[k] = x.type == kInt8 ? double(static_cast<int8_t*>(x.data)[size_t(i) * image + k]) - x.params.zero_point : double(static_cast<float*>(x.data)[size_t(i) * image + k]);
      if (x.type == kFloat32 && w.type == kInt8) {
        float low = 0, high = 0;
        for (double v : in) low = std::min(low, float(v)), high = std::max(high, float(v));
        float scale = low == high ? 1.f : 255.f / (high - low), a = low * scale, c = high * scale;
        float zero = std::nearbyint(std::min(std::max((-128 + a) + (127 + c) > 0 ? -128 - a : 127 - c, -128.f), 127.f));
        for (double& v : in) v = std::min(127.0, std::max(-128.0, double(std::nearbyint(float(v) * scale)) + zero)) - zero;
        x_scale = 1.f / scale;
      }
      for (int p = 0; p < oh; p++) for (int q = 0; q < ow; q++) for (int c = 0; c < outputs; c++) {
        double sum = 0;
        for (int u = 0; u < kh; u++) for (int v = 0; v < kw; v++) {
          int r = p * o.stride_h + u * o.dilation_h - top, s = q * o.stride_w + v * o.dilation_w - left;
          if (r < 0 || s < 0 || r >= h || s >= wide) continue;
          size_t from = ((size_t(c) * size_t(kh) + size_t(u)) * size_t(kw) + size_t(v)) * size_t(inputs), pixel = (size_t(r) * size_t(wide) + size_t(s)) * size_t(inputs);
          for (size_t k = 0; k < size_t(inputs); k++)
            sum += in[pixel + k] * (w.type == kInt8 ? double(static_cast<int8_t*>(w.data)[from + k]) : double(static_cast<float*>(w.data)[from + k]));
        }
        size_t place = ((size_t(i) * size_t(oh) + size_t(p)) * size_t(ow) + size_t(q)) * size_t(outputs) + size_t(c);
        double bias = !b ? 0 : b->type == kInt32 ? double(static_cast<int32_t*>(b->data)[c]) : double(static_cast<float*>(b->data)[c]);
        double scale = grid ? double(grid->data[grid->size > 1 ? c : 0]) : 1;
        if (y.type == kInt8) {
          double real = std::nearbyint((sum + bias) * x_scale * scale / double(y.params.scale)) + y.params.zero_point;
          if (o.activation == kRelu) real = std::max(real, double(y.params.zero_point));
          static_cast<int8_t*>(y.data)[place] = int8_t(std::min(127.0, std::max(-128.0, real)));
        } else {
          double real = (x.type == kFloat32 && w.type == kInt8 ? sum * x_scale * scale : sum) + bias;
          static_cast<float*>(y.data)[place] = float(o.activation == kRelu ? std::max(0.0, real) : real);
        }
      }
    }
  }

  std::vector<std::unique_ptr<char[]>> arena_;
  std::deque<Grid> grids_;
  TfLiteIntArray* plan_copy_ = nullptr;
};

}  // namespace fake
