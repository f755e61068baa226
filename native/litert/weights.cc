#include "weights.h"

#include <cmath>
#include <cstring>

#include "text.h"

namespace paring {
namespace litert {
namespace {

constexpr int64_t sampled_rows = 16, sampled_of_row = 256;

bool is_stored(const TfLiteTensor& t) {
  return (t.allocation_type == kMappedConstant || t.allocation_type == kPersistentConstant) && t.data && t.dims;
}

size_t size_of(TfLiteType t) { return t == kFloat32 ? 4 : t == kFloat16 ? 2 : t == kInt8 ? 1 : 0; }

float half(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | fraction << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  } else {
    float tiny = std::ldexp(float(fraction), -24);
    return sign ? -tiny : tiny;
  }
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

bool is_zero(const char* p, TfLiteType type) {
  uint32_t bits = 0;
  memcpy(&bits, p, size_of(type));
  return type == kFloat32 ? !(bits & 0x7fffffff) : type == kFloat16 ? !(bits & 0x7fff) : !bits;
}

// Unfolds a sparse encoding, level by level: each stored value has one coordinate per level.
class Unfold {
 public:
  Unfold(const TfLiteTensor& t, std::vector<char>* out) : t_(t), s_(*t.sparsity), dims_(dims_of(t)), size_(size_of(t.type)), out_(out) {}

  bool run(std::string* reason) {
    if (!describe()) {
      *reason = "its sparse encoding does not fit its shape";
      return false;
    }
    out_->assign(size_t(elements_of(dims_)) * size_, 0);
    if (!walk(0, 0, 0) || next_ * size_ != t_.bytes) {
      *reason = "its sparse encoding contradicts itself";
      return false;
    }
    return true;
  }

 private:
  // Extent of each level, and how many elements of the dense tensor one step of it is.
  bool describe() {
    int rank = int(dims_.size()), blocks = s_.block_map ? s_.block_map->size : 0;
    if (!s_.traversal_order || !s_.levels || s_.level_count != rank + blocks || s_.traversal_order->size != rank + blocks) return false;
    std::vector<int> level_of(size_t(rank + blocks), -1), block_size(size_t(rank), 1);
    for (int l = 0; l < rank + blocks; l++) {
      int d = s_.traversal_order->data[l];
      if (d < 0 || d >= rank + blocks || level_of[size_t(d)] >= 0) return false;
      level_of[size_t(d)] = l;
    }
    std::vector<int64_t> stride(size_t(rank), 1);
    for (int d = rank - 2; d >= 0; d--) stride[size_t(d)] = stride[size_t(d) + 1] * dims_[size_t(d) + 1];
    extent_.assign(size_t(rank + blocks), 0);
    step_.assign(size_t(rank + blocks), 0);
    for (int b = 0; b < blocks; b++) {
      int d = s_.block_map->data[b];
      if (d < 0 || d >= rank || block_size[size_t(d)] != 1) return false;
      int n = s_.levels[level_of[size_t(rank + b)]].dense_size;
      if (n <= 0 || dims_[size_t(d)] % n) return false;
      block_size[size_t(d)] = n;
      extent_[size_t(level_of[size_t(rank + b)])] = n;
      step_[size_t(level_of[size_t(rank + b)])] = stride[size_t(d)];
    }
    for (int d = 0; d < rank; d++) {
      extent_[size_t(level_of[size_t(d)])] = dims_[size_t(d)] / block_size[size_t(d)];
      step_[size_t(level_of[size_t(d)])] = stride[size_t(d)] * block_size[size_t(d)];
    }
    for (int l = 0; l < rank + blocks; l++) {
      const TfLiteLevel& level = s_.levels[l];
      if (level.format == 0 ? level.dense_size != extent_[size_t(l)] : level.format != 1 || !level.segments || !level.indices) return false;
    }
    return true;
  }

  // `parent`: number of the place in the level above, as compressed levels count them.
  bool walk(size_t l, int64_t parent, int64_t at) {
    if (l == extent_.size()) {
      if ((next_ + 1) * size_ > t_.bytes) return false;
      memcpy(out_->data() + size_t(at) * size_, static_cast<const char*>(t_.data) + next_++ * size_, size_);
      return true;
    }
    const TfLiteLevel& level = s_.levels[l];
    if (level.format == 0) {
      for (int64_t i = 0; i < extent_[l]; i++)
        if (!walk(l + 1, parent * extent_[l] + i, at + i * step_[l])) return false;
      return true;
    }
    if (parent + 1 >= level.segments->size) return false;
    int first = level.segments->data[parent], last = level.segments->data[parent + 1];
    if (first < 0 || last < first || last > level.indices->size) return false;
    for (int k = first; k < last; k++) {
      int i = level.indices->data[k];
      if (i < 0 || i >= extent_[l] || !walk(l + 1, k, at + i * step_[l])) return false;
    }
    return true;
  }

  const TfLiteTensor& t_;
  const TfLiteSparsity& s_;
  std::vector<int> dims_;
  size_t size_;
  std::vector<char>* out_;
  std::vector<int> extent_;
  std::vector<int64_t> step_;
  size_t next_ = 0;   // values read so far
};

// Scales of an int8 tensor; zero points must be 0.
bool read_scales(const TfLiteTensor& t, Constant* c, std::string* reason) {
  auto* q = t.quantization.type == 1 ? static_cast<const TfLiteAffine*>(t.quantization.params) : nullptr;
  if (!q || !q->scale || q->scale->size < 1) {
    *reason = "its int8 weights have no scale";
    return false;
  }
  c->scale.assign(q->scale->data, q->scale->data + q->scale->size);
  c->axis = q->scale->size > 1 ? q->axis : 0;
  bool fits = c->scale.size() == 1 || (c->axis >= 0 && c->axis < int(c->dims.size()) && int(c->scale.size()) == c->dims[size_t(c->axis)]);
  for (int i = 0; q->zero_point && i < q->zero_point->size; i++) fits &= q->zero_point->data[i] == 0;
  for (float s : c->scale) fits &= std::isfinite(s) && s > 0;
  if (!fits) *reason = "its int8 weights are on a grid that kernels do not take (zero point, or scales along another dimension)";
  return fits;
}

void to_float(TfLiteType from, Constant* c) {
  int64_t n = c->elements();
  std::vector<char> wide(size_t(n) * 4);
  float* out = reinterpret_cast<float*>(wide.data());
  if (from == kFloat16) {
    for (int64_t i = 0; i < n; i++) {
      uint16_t h;
      memcpy(&h, static_cast<const char*>(c->data) + 2 * i, 2);
      out[i] = half(h);
    }
  } else {
    int64_t inner = 1;
    for (size_t d = size_t(c->axis) + 1; d < c->dims.size(); d++) inner *= c->dims[d];
    int64_t channels = int64_t(c->scale.size());
    for (int64_t i = 0; i < n; i++) out[i] = float(c->bytes()[i]) * c->scale[size_t(channels > 1 ? i / inner % channels : 0)];
    c->scale.clear();
  }
  c->storage.swap(wide);
  c->data = c->storage.data();
  c->type = kFloat32;
}

void look(Constant* c) {
  int64_t n = c->elements(), zeros = 0;
  if (c->type == kFloat32) {
    uint32_t largest = 0;   // exponent bits all set: infinity or not-a-number
    for (int64_t i = 0; i < n; i++) {
      uint32_t bits;
      memcpy(&bits, c->floats() + i, 4);
      bits &= 0x7fffffff;
      zeros += !bits;
      largest = bits > largest ? bits : largest;
    }
    c->finite = largest < 0x7f800000;
  } else {
    int least = 0;
    for (int64_t i = 0; i < n; i++) {
      int v = c->bytes()[i];
      zeros += !v;
      least = v < least ? v : least;
    }
    c->finite = least > -128;
  }
  c->zeros = zeros;
}

}  // namespace

bool find_source(const Graph& g, int tensor, Source* s) {
  *s = Source();
  // Two helpers at most stand between: DENSIFY and DEQUANTIZE, in either order.
  for (int turn = 0; tensor >= 0 && turn <= 2; turn++) {
    int p = g.producer[size_t(tensor)];
    if (p < 0) {
      s->tensor = tensor;
      return is_stored(g.tensor(tensor)) && size_of(g.tensor(tensor).type) != 0;
    }
    if (g.code(p) != kDequantize && g.code(p) != kDensify) return false;
    s->dequantized |= g.code(p) == kDequantize;
    s->through.push_back(p);
    tensor = g.input(p, 0);
  }
  return false;
}

double sample_zeros(const Graph& g, const Source& s) {
  const TfLiteTensor& t = g.tensor(s.tensor);
  std::vector<int> dims = dims_of(t);
  int64_t n = elements_of(dims), size = int64_t(size_of(t.type));
  if (n == 0) return 0;
  if (t.sparsity) return 1 - double(t.bytes) / double(n * size);
  if (int64_t(t.bytes) < n * size) return 0;
  int64_t rows = dims.empty() ? 1 : dims[0], row = n / rows, take = row < sampled_of_row ? row : sampled_of_row;
  int64_t zeros = 0, seen = 0;
  for (int64_t k = 0; k < sampled_rows && k < rows; k++) {
    int64_t r = rows <= sampled_rows ? k : k * rows / sampled_rows;
    // Different rows are sampled in different places: a mask may leave whole columns.
    int64_t from = (row - take) * k / sampled_rows;
    const char* p = static_cast<const char*>(t.data) + (r * row + from) * size;
    for (int64_t i = 0; i < take; i++) zeros += is_zero(p + i * size, t.type);
    seen += take;
  }
  return double(zeros) / double(seen);
}

bool unpack(const Graph& g, const Source& s, Constant* c, std::string* reason) {
  const TfLiteTensor& t = g.tensor(s.tensor);
  *c = Constant();
  c->type = t.type;
  c->dims = dims_of(t);
  for (int d : c->dims)
    if (d <= 0) {
      *reason = "its weights have no elements";
      return false;
    }
  if (t.sparsity) {
    if (!Unfold(t, &c->storage).run(reason)) return false;
    c->data = c->storage.data();
  } else {
    if (t.bytes != size_t(c->elements()) * size_of(t.type)) {
      *reason = text("its weights have %zu bytes for %lld elements", t.bytes, static_cast<long long>(c->elements()));
      return false;
    }
    c->data = t.data;
  }
  if (t.type == kInt8 && !read_scales(t, c, reason)) return false;
  if (t.type == kFloat16 && !s.dequantized) {
    *reason = "float16 weights without DEQUANTIZE";
    return false;
  }
  if (t.type != kFloat32 && s.dequantized) to_float(t.type, c);
  look(c);
  return true;
}

const int32_t* constant_int32(const Graph& g, int tensor, int64_t* elements) {
  if (tensor < 0 || g.producer[size_t(tensor)] >= 0) return nullptr;
  const TfLiteTensor& t = g.tensor(tensor);
  *elements = elements_of(dims_of(t));
  if (!is_stored(t) || t.type != kInt32 || t.sparsity || t.bytes != size_t(*elements) * 4) return nullptr;
  return static_cast<const int32_t*>(t.data);
}

}  // namespace litert
}  // namespace paring
