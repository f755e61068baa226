#include "product.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <limits>

#include "convert.h"
#include "pool.h"
#include "threads.h"

namespace paring {
namespace tensorflow {
namespace {

// -- attributes -------------------------------------------------------------------------------------------------------

bool flag(TF_OpKernelConstruction* c, const char* name) {
  unsigned char value = 0;
  Status status;
  tf.OpKernelConstruction_GetAttrBool(c, name, &value, status);
  status.check();
  return value != 0;
}

std::vector<int64_t> numbers(TF_OpKernelConstruction* c, const char* name, int wanted) {
  int32_t count = 0, total = 0;
  Status status;
  tf.OpKernelConstruction_GetAttrSize(c, name, &count, &total, status);
  status.check();
  if (count != wanted) fail(invalid_argument, "%s: expected %d numbers, got %d", name, wanted, int(count));
  std::vector<int64_t> list(static_cast<size_t>(count));
  tf.OpKernelConstruction_GetAttrInt64List(c, name, list.data(), count, status);
  status.check();
  return list;
}

std::string word(TF_OpKernelConstruction* c, const char* name) {
  int32_t count = 0, total = 0;
  Status status;
  tf.OpKernelConstruction_GetAttrSize(c, name, &count, &total, status);
  status.check();
  std::string text(size_t(std::max(total, 0)), ' ');
  tf.OpKernelConstruction_GetAttrString(c, name, &text[0], text.size(), status);
  status.check();
  return text;
}

// Height and width of four numbers that leave images and channels alone.
void of_image(TF_OpKernelConstruction* c, const char* name, int32_t* to) {
  std::vector<int64_t> all = numbers(c, name, 4);
  bool fits = all[0] == 1 && all[3] == 1;
  for (int64_t n : all) fits = fits && n >= 1 && n <= std::numeric_limits<int32_t>::max();
  if (!fits) fail(invalid_argument, "%s: expected [1, height, width, 1] of at least 1, got %s", name, text(all).c_str());
  to[0] = int32_t(all[1]);
  to[1] = int32_t(all[2]);
}

constexpr int64_t worth_threads = 1 << 16;   // elements to convert

// -- shapes -----------------------------------------------------------------------------------------------------------

const float* scale_of(const Tensor& scale, int64_t outputs, const Shape& also = {}) {
  Shape shape = scale.shape();
  if (shape != Shape{outputs} && (also.empty() || shape != also)) {
    std::string wanted = text({outputs}) + (also.empty() ? "" : " or " + text(also));
    fail(invalid_argument, "scale: expected the shape %s, one for each output, got %s", wanted.c_str(), text(shape).c_str());
  }
  return static_cast<const float*>(scale.data());
}

void check(int result) {
  if (result) fail(resource_exhausted, "expected working memory, got none");
}

int32_t small(int64_t n, const char* what) {
  if (n > std::numeric_limits<int32_t>::max())
    fail(invalid_argument, "%s: expected less than 2^31, got %lld", what, static_cast<long long>(n));
  return int32_t(n);
}

// Where each matrix of a broadcast batch begins, in matrices of an operand.
std::vector<int64_t> places(const Shape& batch, const Shape& operand) {
  std::vector<int64_t> at{0};
  int64_t step = 1;
  size_t ahead = batch.size() - operand.size();
  for (size_t i = batch.size(); i-- > 0;) {
    int64_t size = i >= ahead ? operand[i - ahead] : 1;
    std::vector<int64_t> more;
    more.reserve(at.size() * size_t(batch[i]));
    for (int64_t j = 0; j < batch[i]; j++)
      for (int64_t a : at) more.push_back(a + (size == 1 ? 0 : j * step));
    at.swap(more);
    step *= size;
  }
  return at;
}

Shape broadcast(const Shape& a, const Shape& b) {
  Shape both(std::max(a.size(), b.size()), 1);
  auto take = [&](const Shape& one) {
    for (size_t i = 0; i < one.size(); i++) {
      int64_t& d = both[both.size() - one.size() + i];
      if (d != one[i] && d != 1 && one[i] != 1)
        fail(invalid_argument, "expected batches of x and weights that broadcast, got %s and %s", text(a).c_str(), text(b).c_str());
      if (one[i] != 1) d = one[i];
    }
  };
  take(a);
  take(b);
  return both;
}

}  // namespace

Product::Product(TF_OpKernelConstruction* c, Form form) : form_(form) {
  Status status;
  tf.OpKernelConstruction_GetAttrType(c, "T", &type_, status);
  status.check();
  round_ = flag(c, "round_to_bfloat16");
  if (form == Form::matmul) transpose_ = flag(c, "transpose_weights");
  if (form == Form::packed_matmul || form == Form::packed_conv) dynamic_ = flag(c, "dynamic");
  if (form != Form::conv && form != Form::packed_conv) return;
  of_image(c, "strides", stride_);
  of_image(c, "dilations", dilation_);
  std::string padding = word(c, "padding");
  padding_ = padding == "SAME" ? Padding::same : padding == "VALID" ? Padding::valid : Padding::explicit_sizes;
  std::vector<int64_t> sizes = numbers(c, "explicit_paddings", padding_ == Padding::explicit_sizes ? 8 : 0);
  if (sizes.empty()) return;
  bool fits = !sizes[0] && !sizes[1] && !sizes[6] && !sizes[7];
  for (int64_t n : sizes) fits = fits && n >= 0 && n <= std::numeric_limits<int32_t>::max();
  if (!fits) fail(invalid_argument, "explicit_paddings: expected [0, 0, top, bottom, left, right, 0, 0], got %s", text(sizes).c_str());
  std::copy(sizes.begin() + 2, sizes.begin() + 6, pad_);
}

Product::Window Product::window(const Shape& x, int64_t kernel_h, int64_t kernel_w, int64_t inputs) const {
  if (x.size() != 4) fail(invalid_argument, "x: expected [images, height, width, channels], got %s", text(x).c_str());
  if (x[3] != inputs) {
    bool grouped = inputs > 0 && x[3] % inputs == 0;
    const char* why = grouped ? ": grouped convolutions have no kernel" : "";
    fail(grouped ? unimplemented : invalid_argument, "x: expected %lld channels, got %s%s", static_cast<long long>(inputs), text(x).c_str(), why);
  }
  Window v = {};
  v.images = small(x[0], "images");
  v.h = small(x[1], "height");
  v.w = small(x[2], "width");
  v.channels = small(x[3], "channels");
  v.kernel_h = small(kernel_h, "kernel height");
  v.kernel_w = small(kernel_w, "kernel width");
  for (int axis = 0; axis < 2; axis++) {
    int64_t size = x[size_t(1 + axis)], step = stride_[axis], before = 0, after = 0, out;
    int64_t reach = ((axis ? kernel_w : kernel_h) - 1) * int64_t(dilation_[axis]) + 1;
    if (padding_ == Padding::same) {
      out = (size + step - 1) / step;
      int64_t around = std::max<int64_t>(0, (out - 1) * step + reach - size);
      before = around / 2;
      after = around - before;
    } else {
      if (padding_ == Padding::explicit_sizes) { before = pad_[2 * axis]; after = pad_[2 * axis + 1]; }
      int64_t room = size + before + after - reach + step;
      if (room < 0)
        fail(invalid_argument, "x: expected images that hold a kernel of %lld positions, got %s",
             static_cast<long long>(reach), text(x).c_str());
      out = room / step;
    }
    (axis ? v.left : v.top) = small(before, "padding");
    (axis ? v.right : v.bottom) = small(after, "padding");
    (axis ? v.out_w : v.out_h) = small(out, "result");
  }
  return v;
}

void Product::run(TF_OpKernelContext* context) {
  int threads = threads_.load(std::memory_order_relaxed);
  if (!threads) threads_.store(threads = configured_threads(context), std::memory_order_relaxed);
  Call c{input(context, 0), input(context, 1), input(context, 2), Tensor(), {}, {}, nullptr, std::max(1, threads)};
  c.x_shape = c.x.shape();
  c.w_shape = c.weights.shape();
  on_large_pages(c.weights);
  switch (form_) {
    case Form::matmul: return matmul(context, c);
    case Form::conv: return conv(context, c);
    default: return packed(context, c);
  }
}

// A row of x meets weights as fast as memory gives them, which from the small pages of TensorFlow's own memory is slower by an
// eighth. A kernel before Linux 6.1 does not know how to gather them: they stay as they are.
void Product::on_large_pages(const Tensor& weights) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  constexpr int collapse = 25;   // MADV_COLLAPSE, which older headers lack
  const void* data = weights.data();
  uintptr_t at = reinterpret_cast<uintptr_t>(data), first = (at + page - 1) / page * page, last = (at + uintptr_t(elements(weights.shape()))) / page * page;   // weights are bytes
  if (last <= first || paged_.exchange(data, std::memory_order_relaxed) == data) return;
  madvise(reinterpret_cast<void*>(first), last - first, collapse);
#else
  (void)weights;
#endif
}

paring_product Product::product(const Call& c, int64_t outputs) const {
  paring_product p = {};
  p.n = p.y_row = outputs;
  p.x = c.x.data();
  p.x_bf16 = p.y_bf16 = type_ == bfloat16;
  p.round = round_;
  p.w = c.weights.data();
  p.bits = 8;
  p.scale = c.scales;
  p.y = c.y.data();
  return p;
}

// -- dense weights ----------------------------------------------------------------------------------------------------

void Product::matmul(TF_OpKernelContext* context, Call& c) const {
  const Shape &xs = c.x_shape, &ws = c.w_shape;
  if (ws.size() < 2) fail(invalid_argument, "weights: expected rank 2 or more, got %s", text(ws).c_str());
  size_t least = ws.size() == 2 ? 1 : 2;
  if (xs.size() < least) fail(invalid_argument, "x: expected rank %d or more, got %s", int(least), text(xs).c_str());
  int64_t k = ws[ws.size() - (transpose_ ? 1 : 2)], n = ws[ws.size() - (transpose_ ? 2 : 1)];
  if (xs.back() != k)
    fail(invalid_argument, "x: expected %lld values to multiply with weights %s, got %s",
         static_cast<long long>(k), text(ws).c_str(), text(xs).c_str());
  Shape w_batch(ws.begin(), ws.end() - 2), own_scales = w_batch;
  own_scales.insert(own_scales.end(), {1, n});
  c.scales = scale_of(c.scale, n, own_scales);
  bool own = c.scale.shape() == own_scales;

  // One product, or one for each matrix of weights: all else are rows of x.
  bool one = w_batch.empty();
  Shape x_batch(xs.begin(), xs.end() - int64_t(least)), batch = one ? Shape() : broadcast(x_batch, w_batch);
  Shape ys = one ? xs : batch;
  if (one) ys.back() = n; else ys.insert(ys.end(), {xs[xs.size() - 2], n});
  c.y = output(context, type_, ys);
  if (!elements(ys)) return;
  paring_product p = product(c, n);
  p.k = p.x_row = k;
  p.m = elements(ys) / n / elements(batch);
  p.transposed = transpose_;
  if (one) return check(paring_product_run(&p, c.threads));
  int32_t products = small(elements(batch), "batch");
  std::vector<int64_t> x_at = places(batch, x_batch), w_at = places(batch, w_batch);
  bool side_by_side = products >= c.threads;
  int64_t element = type_ == float32 ? 4 : 2;
  std::atomic<int> failed{0};
  parallel_for(side_by_side ? c.threads : 1, products, [&](int i) {
    paring_product q = p;
    q.x = static_cast<const char*>(p.x) + x_at[size_t(i)] * p.m * k * element;
    q.w = static_cast<const char*>(p.w) + w_at[size_t(i)] * k * n;
    q.scale = p.scale + (own ? w_at[size_t(i)] * n : 0);
    q.y = static_cast<char*>(p.y) + i * p.m * n * element;
    if (paring_product_run(&q, side_by_side ? 1 : c.threads)) failed = 1;
  });
  check(failed);
}

void Product::conv(TF_OpKernelContext* context, Call& c) const {
  const Shape& ws = c.w_shape;
  if (ws.size() != 4) fail(invalid_argument, "weights: expected [height, width, inputs, outputs], got %s", text(ws).c_str());
  if (ws[0] < 1 || ws[1] < 1) fail(invalid_argument, "weights: expected a kernel of at least 1 x 1, got %s", text(ws).c_str());
  Window v = window(c.x_shape, ws[0], ws[1], ws[2]);
  c.scales = scale_of(c.scale, ws[3]);
  Shape ys = {v.images, v.out_h, v.out_w, ws[3]};
  c.y = output(context, type_, ys);
  if (elements(ys)) run_conv(product(c, ws[3]), v, c.threads);
}

void Product::run_conv(const paring_product& p, const Window& v, int threads) const {
  paring_product_conv c = {};
  c.p = p;
  c.n = v.images;
  c.h = v.h;
  c.w = v.w;
  c.inputs = v.channels;
  c.kernel_h = v.kernel_h;
  c.kernel_w = v.kernel_w;
  c.stride_h = stride_[0];
  c.stride_w = stride_[1];
  c.dilation_h = dilation_[0];
  c.dilation_w = dilation_[1];
  c.pad_top = v.top;
  c.pad_left = v.left;
  c.out_h = v.out_h;
  c.out_w = v.out_w;
  check(paring_product_conv_run(&c, threads));
}

// -- packed weights ---------------------------------------------------------------------------------------------------

void Product::packed(TF_OpKernelContext* context, Call& c) {
  const Shape& xs = c.x_shape;
  if (c.w_shape.size() != 1) fail(invalid_argument, "packed: expected a vector of bytes, got the shape %s", text(c.w_shape).c_str());
  Blob blob = read_blob(c.weights.data(), c.w_shape[0]);
  if (dynamic_ && blob.kind != Blob::sparse_int8)
    fail(invalid_argument, "packed: expected sparse int8 weights for dynamic activations, got kind %d", int(blob.kind));
  c.scales = scale_of(c.scale, blob.outputs);
  Window v;
  Shape ys = xs;
  if (form_ == Form::packed_matmul) {
    if (blob.kernel_h != 1 || blob.kernel_w != 1)
      fail(invalid_argument, "packed: expected a matrix, got a kernel of %d x %d", int(blob.kernel_h), int(blob.kernel_w));
    if (xs.empty() || xs.back() != blob.inputs)
      fail(invalid_argument, "x: expected %d values to multiply with the packed weights, got %s", int(blob.inputs), text(xs).c_str());
    ys.pop_back();
    v = {small(elements(ys), "rows"), 1, 1, blob.inputs, 1, 1, 0, 0, 0, 0, 1, 1};
    ys.push_back(blob.outputs);
  } else {
    v = window(xs, blob.kernel_h, blob.kernel_w, blob.inputs);
    ys = {v.images, v.out_h, v.out_w, blob.outputs};
  }
  c.y = output(context, type_, ys);
  if (!elements(ys)) return;
  if (blob.kind != Blob::int4) return sparse(c, blob, v);
  paring_product p = product(c, blob.outputs);
  p.w = blob.first;
  p.bits = 4;
  p.block = blob.block;
  p.block_scale = reinterpret_cast<const uint16_t*>(blob.second);
  std::vector<uint16_t> aligned;   // a vector of bytes may begin anywhere
  if (reinterpret_cast<uintptr_t>(blob.second) % sizeof(uint16_t)) {
    aligned.resize(size_t(blob.blocks() * blob.outputs));
    std::memcpy(aligned.data(), blob.second, aligned.size() * sizeof(uint16_t));
    p.block_scale = aligned.data();
  }
  if (form_ == Form::packed_conv) return run_conv(p, v, c.threads);
  p.m = v.images;
  p.k = p.x_row = blob.depth;
  check(paring_product_run(&p, c.threads));
}

void Product::sparse(Call& c, const Blob& blob, const Window& v) {
  Geometry g{stride_[0], stride_[1], dilation_[0], dilation_[1], padding_ == Padding::same};
  int64_t pixels = int64_t(v.out_h) * v.out_w, rows = v.images * pixels;
  auto layer = layers_.find(c.weights, c.w_shape[0], blob, g, dynamic_, rows);
  // The kernels know SAME and VALID: other borders are written out.
  bool same = padding_ == Padding::same, border = !same && (v.top || v.bottom || v.left || v.right);
  int64_t h = border ? int64_t(v.h) + v.top + v.bottom : v.h, w = border ? int64_t(v.w) + v.left + v.right : v.w;
  auto plan = layer->take(v.images, small(h, "height"), small(w, "width"), c.threads);

  const float* x = static_cast<const float*>(c.x.data());
  if (type_ == bfloat16 || round_ || border) {
    int64_t line = int64_t(v.w) * v.channels, lines = int64_t(v.images) * v.h;
    plan->x.resize(size_t(v.images * h * w * v.channels));
    if (border) std::fill(plan->x.begin(), plan->x.end(), 0.f);
    parallel_for(lines * line < worth_threads ? 1 : c.threads, small(lines, "lines"), [&](int i) {
      float* to = &plan->x[size_t(((i / v.h * h + i % v.h + v.top * border) * w + v.left * border) * v.channels)];
      int64_t from = i * line;
      if (type_ == bfloat16) widen(static_cast<const uint16_t*>(c.x.data()) + from, line, to);
      else if (round_) round_to_bfloat16(x + from, line, to);
      else std::memcpy(to, x + from, size_t(line) * sizeof(float));
    });
    x = plan->x.data();
  }
  float* y = static_cast<float*>(c.y.data());
  if (type_ == bfloat16) {
    plan->y.resize(size_t(rows * blob.outputs));
    y = plan->y.data();
  }
  paring_run(plan->plan, x, y);
  bool plain = type_ == float32 && std::all_of(c.scales, c.scales + blob.outputs, [](float s) { return s == 1; });
  if (!plain)
    parallel_for(rows * blob.outputs < worth_threads ? 1 : c.threads, small(rows, "pixels"), [&](int i) {
      int64_t at = int64_t(i) * blob.outputs;
      if (type_ == float32) scale_row(y + at, c.scales, blob.outputs);
      else scale_row_to_bfloat16(y + at, c.scales, blob.outputs, static_cast<uint16_t*>(c.y.data()) + at);
    });
  layer->give_back(std::move(plan));
}

}  // namespace tensorflow
}  // namespace paring
