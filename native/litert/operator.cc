#include "operator.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "text.h"

namespace paring {
namespace litert {
namespace {

constexpr float infinite = std::numeric_limits<float>::infinity();
// A sample of a weight may show fewer zeros than it has; this much below the threshold it does not.
constexpr double sample_margin = 0.15;

bool activation(int32_t code, float* low, float* high) {
  *low = -infinite, *high = infinite;
  if (code == kRelu || code == kRelu6) *low = 0;
  if (code == kRelu6) *high = 6;
  if (code == kReluN1To1) *low = -1, *high = 1;
  return code >= kNoActivation && code <= kRelu6;
}

bool constant(const TfLiteTensor& t) { return t.allocation_type == kMappedConstant || t.allocation_type == kPersistentConstant; }

// One grid for the whole tensor, with a scale that numbers can be divided by.
bool one_grid(const TfLiteTensor& t, float* scale, int32_t* zero) {
  auto* q = t.quantization.type == 1 ? static_cast<const TfLiteAffine*>(t.quantization.params) : nullptr;
  *scale = t.params.scale, *zero = t.params.zero_point;
  return q && q->scale && q->scale->size == 1 && std::isfinite(*scale) && *scale > 0 && *zero >= -128 && *zero <= 127;
}

// [batch][k][n] -> [batch][n][k], so that each output's weights lie together.
void transpose(Constant* c) {
  size_t rank = c->dims.size();
  int64_t k = c->dims[rank - 2], n = c->dims[rank - 1], matrices = c->elements() / (k * n);
  int64_t size = c->type == kFloat32 ? 4 : 1;
  std::vector<char> turned(size_t(c->elements() * size));
  const char* from = static_cast<const char*>(c->data);
  for (int64_t m = 0; m < matrices; m++)
    for (int64_t i = 0; i < k; i++)
      for (int64_t j = 0; j < n; j++)
        memcpy(&turned[size_t(((m * n + j) * k + i) * size)], from + ((m * k + i) * n + j) * size, size_t(size));
  c->storage.swap(turned);
  c->data = c->storage.data();
  std::swap(c->dims[rank - 2], c->dims[rank - 1]);
  if (c->scale.size() > 1) c->axis = c->axis == int(rank) - 1 ? int(rank) - 2 : int(rank) - 1;
}

class Reader {
 public:
  Reader(const Graph& g, int position, double threshold, Operator* op, std::string* reason)
      : g_(g), p_(position), threshold_(threshold), op_(*op), reason_(*reason), options_(g.nodes[size_t(position)].node->builtin_data) {
    op_ = Operator();
    op_.position = position;
    op_.x = g.input(position, 0);
    op_.y = g.output(position, 0);
  }

  Verdict read() {
    int code = g_.code(p_);
    if (code != kFullyConnected && code != kConv2d && code != kBatchMatmul && code != kDepthwiseConv2d && code != kAdd && code != kPad)
      return Verdict::other;
    if (op_.x < 0 || op_.y < 0 || g_.inputs(p_) < 2 || g_.input(p_, 1) < 0) return no("it lacks an input or an output");
    if (!options_ && code != kPad) return no("it has no options");
    switch (code) {
      case kFullyConnected: return fully_connected();
      case kConv2d: return conv_2d();
      case kBatchMatmul: return batch_matmul();
      case kDepthwiseConv2d: return depthwise();
      case kAdd: return add();
      default: return pad();
    }
  }

 private:
  Verdict no(const std::string& why) {
    reason_ = why;
    return Verdict::not_taken;
  }
  const TfLiteTensor& x() const { return g_.tensor(op_.x); }
  const TfLiteTensor& y() const { return g_.tensor(op_.y); }

  void geometry(int outputs, int kernel_h, int kernel_w, int inputs) {
    paring_conv& c = op_.conv;
    c.outputs = outputs, c.kernel_h = kernel_h, c.kernel_w = kernel_w, c.inputs = inputs;
    c.stride_h = c.stride_w = c.dilation_h = c.dilation_w = 1;
  }
  bool window(int padding, int stride_h, int stride_w, int dilation_h, int dilation_w) {
    paring_conv& c = op_.conv;
    c.stride_h = stride_h, c.stride_w = stride_w, c.dilation_h = dilation_h, c.dilation_w = dilation_w;
    c.same = padding == kSame;
    return (padding == kSame || padding == kValid) && stride_h > 0 && stride_w > 0 && dilation_h > 0 && dilation_w > 0;
  }

  // The weights, unless they are no constant, dense, or nothing for a kernel.
  Verdict weights() {
    Source s;
    if (!find_source(g_, g_.input(p_, 1), &s)) return no("its weights are no constant of a type that kernels take");
    double sampled = sample_zeros(g_, s);
    if (sampled < threshold_ - sample_margin) return no(text("about %.0f %% zeros", 100 * sampled));
    std::string why;
    if (!unpack(g_, s, &op_.weights, &why)) return no(why);
    if (!op_.weights.finite)
      return no(op_.weights.type == kFloat32 ? "its weights have infinities or not-a-numbers" : "its int8 weights have -128");
    op_.zeros = double(op_.weights.zeros) / double(op_.weights.elements());
    if (op_.zeros < threshold_) return no(text("%.0f %% zeros", 100 * op_.zeros));
    op_.helpers = s.through;
    return Verdict::taken;
  }

  Verdict bias(TfLiteType type, int outputs) {
    int tensor = g_.input(p_, 2);
    if (tensor < 0) return Verdict::taken;
    if (type == kInt32) {
      int64_t n;
      op_.conv.bias = constant_int32(g_, tensor, &n);
      if (!op_.conv.bias || n != outputs) return no("its bias is no constant of one int32 per output");
      return Verdict::taken;
    }
    Source s;
    std::string why;
    if (!find_source(g_, tensor, &s) || !unpack(g_, s, &op_.bias, &why) || op_.bias.type != kFloat32 || op_.bias.elements() != outputs)
      return no("its bias is no constant of one float per output");
    op_.conv.bias = op_.bias.data;
    op_.helpers.insert(op_.helpers.end(), s.through.begin(), s.through.end());
    return Verdict::taken;
  }

  // Types of activations and weights that kernels exist for; grids, bias and pointers behind them.
  Verdict types(int32_t activation_code, int outputs, int channel_axis) {
    paring_conv& c = op_.conv;
    Constant& w = op_.weights;
    if (!activation(activation_code, &c.low, &c.high)) return no(text("fused activation %d", activation_code));
    TfLiteType in = x().type, out = y().type;
    c.weights = w.data;
    if (in == kFloat32 && out == kFloat32 && w.type == kFloat32) {
      c.type = PARING_F32;
      return bias(kFloat32, outputs);
    }
    bool dynamic = in == kFloat32 && out == kFloat32 && w.type == kInt8;
    if (!dynamic && !(in == kInt8 && out == kInt8 && w.type == kInt8))
      return no(text("types %d x %d -> %d", in, w.type, out));
    if (w.scale.size() > 1 && (w.axis != channel_axis || int(w.scale.size()) != outputs)) return no("its scales are not per output");
    op_.scale = w.scale;
    c.weight_scale = op_.scale.data();
    c.weight_scales = int32_t(op_.scale.size());
    c.type = dynamic ? PARING_QD8 : PARING_S8;
    if (!dynamic && (!one_grid(x(), &c.x_scale, &c.x_zero) || !one_grid(y(), &c.y_scale, &c.y_zero)))
      return no("its activations are not on one grid per tensor");
    return bias(dynamic ? kFloat32 : kInt32, outputs);
  }

  Verdict fully_connected() {
    auto* o = static_cast<const TfLiteFullyConnectedParams*>(options_);
    op_.form = Operator::Form::rows;
    op_.keep_dims = o->keep_num_dims;
    if (o->weights_format != 0) return no("its weights are shuffled");
    if (Verdict v = weights(); v != Verdict::taken) return v;
    const std::vector<int>& d = op_.weights.dims;
    if (d.size() != 2) return no("its weights are no matrix");
    geometry(d[0], 1, 1, d[1]);
    return types(o->activation, d[0], 0);
  }

  Verdict conv_2d() {
    auto* o = static_cast<const TfLiteConvParams*>(options_);
    op_.form = Operator::Form::image;
    if (Verdict v = weights(); v != Verdict::taken) return v;
    const std::vector<int>& d = op_.weights.dims;
    std::vector<int> in = dims_of(x());
    if (d.size() != 4 || in.size() != 4) return no("its tensors are not of rank 4");
    if (in[3] != d[3]) return no("it has groups of channels");
    geometry(d[0], d[1], d[2], d[3]);
    if (!window(o->padding, o->stride_h, o->stride_w, o->dilation_h, o->dilation_w)) return no("its window is not valid");
    return types(o->activation, d[0], 0);
  }

  Verdict batch_matmul() {
    auto* o = static_cast<const TfLiteBatchMatmulParams*>(options_);
    op_.form = Operator::Form::matrices;
    if (o->adj_x) return no("its first operand is transposed");
    if (Verdict v = weights(); v != Verdict::taken) return v;
    if (op_.weights.dims.size() < 2) return no("its weights are no matrix");
    if (!o->adj_y) transpose(&op_.weights);
    const std::vector<int>& d = op_.weights.dims;
    op_.batch.assign(d.begin(), d.end() - 2);
    if (x().type == kInt8) return no("int8 activations");
    if (op_.weights.type == kInt8 && op_.matrices() != 1) return no("several int8 matrices");
    geometry(d[d.size() - 2], 1, 1, d[d.size() - 1]);
    return types(kNoActivation, op_.conv.outputs, int(d.size()) - 2);
  }

  Verdict depthwise() {
    auto* o = static_cast<const TfLiteDepthwiseParams*>(options_);
    op_.kind = Operator::Kind::depthwise;
    Source s;
    std::string why;
    if (x().type != kFloat32 || y().type != kFloat32) return no("it is not float32");
    if (!find_source(g_, g_.input(p_, 1), &s) || !unpack(g_, s, &op_.weights, &why) || op_.weights.type != kFloat32 || !op_.weights.finite)
      return no("its weights are no finite float constant");
    op_.helpers = s.through;
    const std::vector<int>& d = op_.weights.dims;
    std::vector<int> in = dims_of(x());
    if (d.size() != 4 || d[0] != 1 || in.size() != 4 || in[3] != d[3] || o->multiplier != 1) return no("its depth multiplier is not 1");
    geometry(d[3], d[1], d[2], d[3]);
    if (!window(o->padding, o->stride_h, o->stride_w, o->dilation_h, o->dilation_w)) return no("its window is not valid");
    op_.conv.weights = op_.weights.data;
    op_.conv.type = PARING_F32;
    if (!activation(o->activation, &op_.conv.low, &op_.conv.high)) return no(text("fused activation %d", o->activation));
    return bias(kFloat32, d[3]);
  }

  Verdict add() {
    op_.kind = Operator::Kind::add;
    op_.x2 = g_.input(p_, 1);
    const TfLiteTensor& b = g_.tensor(op_.x2);
    if (x().type != kFloat32 || b.type != kFloat32 || y().type != kFloat32) return no("it is not float32");
    if (op_.x == op_.x2 || constant(x()) || constant(b) || dims_of(x()).size() != 4 || dims_of(x()) != dims_of(b))
      return no("its operands are not two images of one shape");
    if (!activation(static_cast<const TfLiteAddParams*>(options_)->activation, &op_.low, &op_.high)) return no("fused activation");
    return Verdict::taken;
  }

  Verdict pad() {
    op_.kind = Operator::Kind::pad;
    int64_t n = 0;
    const int32_t* p = constant_int32(g_, g_.input(p_, 1), &n);
    if (x().type != kFloat32 || dims_of(x()).size() != 4 || !p || n != 8) return no("it is not a float image with constant paddings");
    for (int i = 0; i < 8; i++)
      if (p[i] < 0 || (p[i] && (i < 2 || i > 5))) return no("it pads something else than the sides of an image");
    op_.before_h = p[2], op_.after_h = p[3], op_.before_w = p[4], op_.after_w = p[5];
    return Verdict::taken;
  }

  const Graph& g_;
  int p_;
  double threshold_;
  Operator& op_;
  std::string& reason_;
  const void* options_;
};

bool image_shape(const Operator& op, const std::vector<int>& x, Geometry* g, std::string* reason) {
  const paring_conv& c = op.conv;
  if (x.size() != 4 || x[3] != c.inputs) {
    *reason = text("expected an image of %d channels, got rank %zu with %d", c.inputs, x.size(), x.empty() ? 0 : x.back());
    return false;
  }
  int h = 0, w = 0;
  paring_output_shape(&c, x[1], x[2], &h, &w);
  if (h <= 0 || w <= 0) {
    *reason = text("expected an image that its %d x %d window fits into, got %d x %d", c.kernel_h, c.kernel_w, x[1], x[2]);
    return false;
  }
  g->n = x[0], g->h = x[1], g->w = x[2];
  // XNNPACK runs these as dense layers, so that each pixel is quantized by itself, not each image.
  bool point = c.kernel_h == 1 && c.kernel_w == 1 && c.stride_h == 1 && c.stride_w == 1;
  int64_t pixels = int64_t(x[0]) * x[1] * x[2];
  if (c.type == PARING_QD8 && point && pixels <= std::numeric_limits<int>::max()) g->n = int(pixels), g->h = g->w = 1;
  g->y = {x[0], h, w, c.outputs};
  return true;
}

bool rows_shape(const Operator& op, const std::vector<int>& x, Geometry* g, std::string* reason) {
  int64_t n = elements_of(x);
  bool fits = !x.empty() && n % op.conv.inputs == 0 && (!op.keep_dims || x.back() == op.conv.inputs);
  // Rows that LiteRT makes of several of x's: XNNPACK quantizes x's, so a dynamic product would differ.
  fits &= op.conv.type != PARING_QD8 || (!x.empty() && x.back() == op.conv.inputs);
  if (!fits || n / op.conv.inputs > std::numeric_limits<int>::max()) {
    *reason = text("expected rows of %d values, got %lld values in all, %d in the last dimension", op.conv.inputs,
                   static_cast<long long>(n), x.empty() ? 0 : x.back());
    return false;
  }
  g->n = int(n / op.conv.inputs), g->h = g->w = 1;
  g->y = {g->n, op.conv.outputs};
  if (op.keep_dims) g->y = x, g->y.back() = op.conv.outputs;
  return true;
}

bool matrices_shape(const Operator& op, const std::vector<int>& x, Geometry* g, std::string* reason) {
  size_t rank = x.size(), own = op.batch.size() + 2;
  bool one = op.matrices() == 1;
  bool fits = rank >= 2 && rank >= own && x.back() == op.conv.inputs;
  if (fits && !one) fits = rank == own && std::vector<int>(x.begin(), x.end() - 2) == op.batch;
  if (!fits) {
    *reason = text("expected matrices with %d columns, as many as the constant has, got rank %zu with %d", op.conv.inputs, rank,
                   x.empty() ? 0 : x.back());
    return false;
  }
  g->n = int(one ? elements_of(x) / op.conv.inputs : x[rank - 2]), g->h = g->w = 1;
  g->y = x, g->y.back() = op.conv.outputs;
  return true;
}

}  // namespace

void Operator::drop_constants() {
  weights.storage = {};
  bias.storage = {};
  weights.data = bias.data = nullptr;
  conv.weights = conv.bias = nullptr;
}

Verdict recognize(const Graph& g, int position, double threshold, Operator* op, std::string* reason) {
  return Reader(g, position, threshold, op, reason).read();
}

bool shape(const Operator& op, const std::vector<int>& x, const std::vector<int>& x2, Geometry* g, std::string* reason) {
  if (op.kind == Operator::Kind::product && op.form == Operator::Form::rows) return rows_shape(op, x, g, reason);
  if (op.kind == Operator::Kind::product && op.form == Operator::Form::matrices) return matrices_shape(op, x, g, reason);
  if (op.kind == Operator::Kind::product || op.kind == Operator::Kind::depthwise) return image_shape(op, x, g, reason);
  if (x.size() != 4 || (op.kind == Operator::Kind::add && x2 != x)) {
    *reason = "expected images of one shape";
    return false;
  }
  g->n = x[0], g->h = x[1], g->w = x[2];
  g->y = {x[0], x[1] + op.before_h + op.after_h, x[2] + op.before_w + op.after_w, x[3]};
  return true;
}

const char* operator_name(int code) {
  switch (code) {
    case kAdd: return "ADD";
    case kConv2d: return "CONV_2D";
    case kDepthwiseConv2d: return "DEPTHWISE_CONV_2D";
    case kFullyConnected: return "FULLY_CONNECTED";
    case kPad: return "PAD";
    case kBatchMatmul: return "BATCH_MATMUL";
    case kDequantize: return "DEQUANTIZE";
    case kDensify: return "DENSIFY";
    default: return "operator";
  }
}

const char* type_name(const Operator& op) {
  return op.conv.type == PARING_QD8 ? "int8 dynamic" : op.conv.type == PARING_S8 ? "int8" : "float32";
}

}  // namespace litert
}  // namespace paring
