// The TensorFlow operators in a stand-in of TensorFlow: this program offers the C API that they look for. Values, damaged
// weights, several threads at one node, tensors that come and go. Meant to run under sanitizers, where TensorFlow cannot.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "../tensorflow/api.h"

namespace paring {
namespace tensorflow {

using Shape = std::vector<int64_t>;
std::atomic<int> living{0};   // tensors

struct TF_Status { int code = 0; std::string message; };
struct Bytes {
  explicit Bytes(size_t n) : at(static_cast<char*>(std::malloc(n ? n : 1))) { living++; }
  ~Bytes() { std::free(at); living--; }
  char* at;
};
struct TF_Tensor { int type; Shape shape; std::shared_ptr<Bytes> bytes; };
struct Attributes {
  int type = float32;
  std::map<std::string, bool> flags;
  std::map<std::string, std::string> words;
  std::map<std::string, Shape> lists;
};
struct TF_OpKernelConstruction { Attributes attributes; TF_Status failed; };
struct TF_OpKernelContext {
  std::vector<TF_Tensor*> inputs;
  std::unique_ptr<TF_Tensor> result;
  TF_Status failed;
  int64_t step = 1;
};
struct TF_KernelBuilder { Create create; Compute compute; Destroy destroy; };
struct TF_OpDefinitionBuilder { std::string name; std::vector<std::string> specs; InferShape infer = nullptr; };
struct TF_ShapeHandle { bool known = true; Shape dims; };
struct TF_DimensionHandle { int64_t value = -1; };
struct TF_ShapeInferenceContext { std::vector<TF_ShapeHandle> inputs; TF_ShapeHandle output; };

// What loading has registered: before main, so nothing here may be made later.
std::map<std::string, TF_KernelBuilder>& kernels() { static std::map<std::string, TF_KernelBuilder> all; return all; }
std::map<std::string, TF_OpDefinitionBuilder>& definitions() { static std::map<std::string, TF_OpDefinitionBuilder> all; return all; }

template <class Map> auto look(const Map& map, const char* name, TF_Status* s) {
  auto found = map.find(name);
  *s = found == map.end() ? TF_Status{invalid_argument, std::string("no attribute ") + name} : TF_Status{};
  return found == map.end() ? typename Map::mapped_type() : found->second;
}

#pragma GCC visibility push(default)
extern "C" {
TF_Status* TF_NewStatus() { return new TF_Status; }
void TF_DeleteStatus(TF_Status* s) { delete s; }
void TF_SetStatus(TF_Status* s, int code, const char* message) { *s = {code, message}; }
int TF_GetCode(const TF_Status* s) { return s->code; }
const char* TF_Message(const TF_Status* s) { return s->message.c_str(); }
TF_Buffer* TF_NewBuffer() { return new TF_Buffer{}; }
void TF_DeleteBuffer(TF_Buffer* b) { delete b; }
void TF_DeleteTensor(TF_Tensor* t) { delete t; }
TF_Tensor* TF_TensorMaybeMove(TF_Tensor* t) {
  if (t->bytes.use_count() != 1) return nullptr;
  auto* moved = new TF_Tensor(std::move(*t));
  delete t;
  return moved;
}
int TF_TensorType(const TF_Tensor* t) { return t->type; }
int TF_NumDims(const TF_Tensor* t) { return int(t->shape.size()); }
int64_t TF_Dim(const TF_Tensor* t, int i) { return t->shape[size_t(i)]; }
void* TF_TensorData(const TF_Tensor* t) { return t->bytes->at; }
void TF_GetInput(TF_OpKernelContext* c, int i, TF_Tensor** t, TF_Status* s) { *t = new TF_Tensor(*c->inputs[size_t(i)]); *s = {}; }
TF_Tensor* TF_AllocateOutput(TF_OpKernelContext* c, int, int type, const int64_t* dims, int rank, size_t bytes, TF_Status* s) {
  c->result.reset(new TF_Tensor{type, Shape(dims, dims + rank), std::make_shared<Bytes>(bytes)});
  *s = {};
  return new TF_Tensor(*c->result);
}
int64_t TF_StepId(TF_OpKernelContext* c) { return c->step; }
void TF_GetSerializedConfigProto(TF_OpKernelContext* c, TF_Buffer* b, TF_Status* s) {
  if (c->step == 0) std::abort();   // TensorFlow ends here, too
  static const char config[] = "\x0a\x03" "CPU" "\x10\x02" "\x28\x07";   // devices, 2 threads within an operator, 7 between
  b->data = config;
  b->length = sizeof config - 1;
  *s = {};
}
void TF_OpKernelContext_Failure(TF_OpKernelContext* c, TF_Status* s) { c->failed = *s; }
void TF_OpKernelConstruction_Failure(TF_OpKernelConstruction* c, TF_Status* s) { c->failed = *s; }
void TF_OpKernelConstruction_GetAttrSize(TF_OpKernelConstruction* c, const char* name, int32_t* list, int32_t* total, TF_Status* s) {
  bool word = c->attributes.words.count(name) > 0;
  *list = word ? -1 : int32_t(look(c->attributes.lists, name, s).size());
  *total = word ? int32_t(look(c->attributes.words, name, s).size()) : -1;
}
void TF_OpKernelConstruction_GetAttrType(TF_OpKernelConstruction* c, const char*, int* type, TF_Status* s) { *type = c->attributes.type; *s = {}; }
void TF_OpKernelConstruction_GetAttrBool(TF_OpKernelConstruction* c, const char* name, unsigned char* value, TF_Status* s) { *value = look(c->attributes.flags, name, s); }
void TF_OpKernelConstruction_GetAttrString(TF_OpKernelConstruction* c, const char* name, char* to, size_t most, TF_Status* s) {
  std::string word = look(c->attributes.words, name, s);
  std::memcpy(to, word.data(), std::min(most, word.size()));
}
void TF_OpKernelConstruction_GetAttrInt64List(TF_OpKernelConstruction* c, const char* name, int64_t* to, int most, TF_Status* s) {
  Shape list = look(c->attributes.lists, name, s);
  std::copy_n(list.begin(), std::min(size_t(most), list.size()), to);
}
TF_KernelBuilder* TF_NewKernelBuilder(const char*, const char*, Create create, Compute compute, Destroy destroy) { return new TF_KernelBuilder{create, compute, destroy}; }
void TF_RegisterKernelBuilder(const char* name, TF_KernelBuilder* b, TF_Status* s) { kernels()[name] = *b; delete b; *s = {}; }
TF_OpDefinitionBuilder* TF_NewOpDefinitionBuilder(const char* name) { return new TF_OpDefinitionBuilder{name, {}}; }
void TF_OpDefinitionBuilderAddAttr(TF_OpDefinitionBuilder* b, const char* spec) { b->specs.push_back(spec); }
void TF_OpDefinitionBuilderAddInput(TF_OpDefinitionBuilder* b, const char* spec) { b->specs.push_back(spec); }
void TF_OpDefinitionBuilderAddOutput(TF_OpDefinitionBuilder* b, const char* spec) { b->specs.push_back(spec); }
void TF_OpDefinitionBuilderSetShapeInferenceFunction(TF_OpDefinitionBuilder* b, InferShape infer) { b->infer = infer; }
void TF_RegisterOpDefinition(TF_OpDefinitionBuilder* b, TF_Status* s) { definitions()[b->name] = *b; delete b; *s = {}; }
TF_ShapeHandle* TF_NewShapeHandle() { return new TF_ShapeHandle; }
void TF_DeleteShapeHandle(TF_ShapeHandle* h) { delete h; }
TF_DimensionHandle* TF_NewDimensionHandle() { return new TF_DimensionHandle; }
void TF_DeleteDimensionHandle(TF_DimensionHandle* d) { delete d; }
void TF_ShapeInferenceContextGetInput(TF_ShapeInferenceContext* c, int i, TF_ShapeHandle* h, TF_Status* s) { *h = c->inputs[size_t(i)]; *s = {}; }
void TF_ShapeInferenceContextSetOutput(TF_ShapeInferenceContext* c, int, TF_ShapeHandle* h, TF_Status* s) { c->output = *h; *s = {}; }
void TF_ShapeInferenceContextSetUnknownShape(TF_ShapeInferenceContext* c, TF_Status* s) { c->output = {false, {}}; *s = {}; }
int64_t TF_ShapeInferenceContextRank(TF_ShapeInferenceContext*, TF_ShapeHandle* h) { return int64_t(h->dims.size()); }
int TF_ShapeInferenceContextRankKnown(TF_ShapeInferenceContext*, TF_ShapeHandle* h) { return h->known; }
void TF_ShapeInferenceContextDim(TF_ShapeInferenceContext*, TF_ShapeHandle* h, int64_t i, TF_DimensionHandle* d) { d->value = h->dims.at(size_t(i)); }
int TF_DimensionHandleValueKnown(TF_DimensionHandle* d) { return d->value >= 0; }
int64_t TF_DimensionHandleValue(TF_DimensionHandle* d) { return d->value; }
void TF_ShapeInferenceContextSubshape(TF_ShapeInferenceContext*, TF_ShapeHandle* h, int64_t first, int64_t last, TF_ShapeHandle* to, TF_Status* s) {
  *to = {true, Shape(h->dims.begin() + first, h->dims.begin() + last)};
  *s = {};
}
TF_ShapeHandle* TF_ShapeInferenceContextVectorFromSize(TF_ShapeInferenceContext*, size_t size) { return new TF_ShapeHandle{true, {int64_t(size)}}; }
void TF_ShapeInferenceContextConcatenateShapes(TF_ShapeInferenceContext*, TF_ShapeHandle* a, TF_ShapeHandle* b, TF_ShapeHandle* to, TF_Status* s) {
  TF_ShapeHandle both = *a;
  both.dims.insert(both.dims.end(), b->dims.begin(), b->dims.end());
  *to = both;
  *s = {};
}
}
#pragma GCC visibility pop

// The stand-in has just what the library declares.
#define PARING_SAME(result, name, arguments) static_assert(std::is_same<decltype(&TF_##name), result(*) arguments>::value, #name);
PARING_TENSORFLOW_CALLS(PARING_SAME)
#undef PARING_SAME

}  // namespace tensorflow
}  // namespace paring

using namespace paring::tensorflow;

namespace {

int failures = 0;
#define CHECK(what) \
  do { \
    if (!(what)) { \
      failures++; \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what); \
    } \
  } while (0)

template <class T> TF_Tensor tensor(int type, Shape shape, const std::vector<T>& values) {
  TF_Tensor t{type, std::move(shape), std::make_shared<Bytes>(values.size() * sizeof(T))};
  if (!values.empty()) std::memcpy(t.bytes->at, values.data(), values.size() * sizeof(T));
  return t;
}

// One node of a graph.
class Node {
 public:
  Node(const char* name, Attributes attributes = {}) : builder_(kernels().at(std::string("ImportParingTensorflow>") + name)) {
    attributes.flags.insert({{"round_to_bfloat16", false}, {"transpose_weights", false}, {"dynamic", false}});
    attributes.lists.insert({{"strides", {1, 1, 1, 1}}, {"dilations", {1, 1, 1, 1}}, {"explicit_paddings", {}}});
    attributes.words.insert({"padding", "SAME"});
    TF_OpKernelConstruction c{attributes, {}};
    kernel_ = builder_.create(&c);
    failed = c.failed.message;
  }
  ~Node() { builder_.destroy(kernel_); }
  // The result; empty, with `why`, where the operator refuses.
  std::vector<float> run(TF_Tensor& x, TF_Tensor& weights, TF_Tensor& scale, std::string* why = nullptr, int64_t step = 1) {
    TF_OpKernelContext c{{&x, &weights, &scale}, nullptr, {}, step};
    builder_.compute(kernel_, &c);
    if (why) *why = c.failed.message;
    if (c.failed.code != ok || !c.result) return {};
    size_t n = 1;
    for (int64_t d : c.result->shape) n *= size_t(d);
    const float* at = reinterpret_cast<const float*>(c.result->bytes->at);
    return std::vector<float>(at, at + n);
  }
  std::string failed;

 private:
  TF_KernelBuilder builder_;
  void* kernel_;
};

struct Layer {
  int depth, outputs;
  std::vector<float> dense;      // [depth][outputs]
  std::vector<int8_t> blob;
};

// As packed.py writes it: kind 1 with a block of 4 and scales of 2, kind 2 or 3.
Layer pack(int kind, int depth, int outputs, int seed) {
  std::mt19937 engine(static_cast<unsigned>(seed));
  auto dice = [&](int from, int to) { return std::uniform_int_distribution<int>(from, to)(engine); };
  Layer l{depth, outputs, std::vector<float>(size_t(depth) * size_t(outputs)), std::vector<int8_t>(64)};
  int32_t header[] = {kind, 1, 1, depth, outputs, kind == 1 ? 4 : 0};
  std::vector<float> values;
  size_t row = size_t(depth + 7) / 8, first = kind == 1 ? size_t(depth + 1) / 2 * size_t(outputs) : row * size_t(outputs);
  l.blob.resize((64 + first + 63) / 64 * 64);
  for (int o = 0; o < outputs; o++)
    for (int k = 0; k < depth; k++) {
      int q = kind == 1 ? dice(-8, 7) : dice(0, 3) ? 0 : dice(1, 9);
      l.dense[size_t(k) * size_t(outputs) + size_t(o)] = float(kind == 1 ? 2 * q : q);
      if (kind == 1) l.blob[64 + size_t(k / 2) * size_t(outputs) + size_t(o)] |= int8_t((q & 15) << (k % 2 * 4));
      else if (q) { l.blob[64 + size_t(o) * row + size_t(k) / 8] |= int8_t(1 << k % 8); values.push_back(float(q)); }
    }
  int64_t nonzeros = kind == 1 ? 0 : int64_t(values.size());
  std::memcpy(&l.blob[0], "PARING\0\1", 8);
  std::memcpy(&l.blob[8], header, sizeof header);
  std::memcpy(&l.blob[32], &nonzeros, 8);
  auto append = [&](const void* at, size_t bytes) { l.blob.insert(l.blob.end(), static_cast<const int8_t*>(at), static_cast<const int8_t*>(at) + bytes); };
  uint16_t two = 0x4000;
  if (kind == 1) for (int i = 0; i < (depth + 3) / 4 * outputs; i++) append(&two, 2);
  for (float v : values) { int8_t small = int8_t(v); kind == 2 ? append(&v, 4) : append(&small, 1); }
  return l;
}

bool right(const std::vector<float>& found, const std::vector<float>& x, const Layer& l) {
  size_t rows = x.size() / size_t(l.depth);
  if (found.size() != rows * size_t(l.outputs)) return false;
  for (size_t m = 0; m < rows; m++)
    for (int o = 0; o < l.outputs; o++) {
      double sum = 0;
      for (int k = 0; k < l.depth; k++) sum += double(x[m * size_t(l.depth) + size_t(k)]) * double(l.dense[size_t(k) * size_t(l.outputs) + size_t(o)]);
      if (std::abs(found[m * size_t(l.outputs) + size_t(o)] - sum) > 1e-3 * (1 + std::abs(sum))) return false;
    }
  return true;
}

std::vector<float> ones(int n) { return std::vector<float>(size_t(n), 1.f); }
std::vector<float> ramp(int n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (int i = 0; i < n; i++) x[size_t(i)] = float(i % 7) - 3;
  return x;
}

void values() {
  CHECK(kernels().size() == 4 && definitions().size() == 4);
  for (int kind : {1, 2, 3})
    for (int depth : {1, 9, 40}) {
      Layer l = pack(kind, depth, 33, kind);
      TF_Tensor x = tensor(float32, {5, depth}, ramp(5 * depth)), w = tensor(int8, {int64_t(l.blob.size())}, l.blob), scale = tensor(float32, {33}, ones(33));
      Node node("PackedMatMul");
      CHECK(right(node.run(x, w, scale), ramp(5 * depth), l));
      CHECK(right(node.run(x, w, scale, nullptr, 0), ramp(5 * depth), l));   // as TensorFlow folds constants
      Attributes conv;
      Node area("PackedConv2D", conv);
      x.shape = {1, 5, 1, depth};
      CHECK(right(area.run(x, w, scale), ramp(5 * depth), l));
    }
  Attributes bad;
  bad.lists["strides"] = {1, 1, 1};
  CHECK(Node("Conv2D", bad).failed == "strides: expected 4 numbers, got 3");
  TF_ShapeInferenceContext infer{{{true, {-1, 3, 8}}, {true, {4, 8, 9}}, {true, {9}}}, {}};
  TF_Status status;
  definitions().at("ImportParingTensorflow>MatMul").infer(&infer, &status);
  CHECK(status.code == ok && infer.output.dims == (Shape{4, 3, 9}));
}

void damaged() {
  std::mt19937 engine(3);
  for (int kind : {1, 2, 3})
    for (bool dynamic : {false, true}) {
      Layer l = pack(kind, 12, 5, kind);
      Attributes a;
      a.flags["dynamic"] = dynamic;
      Node node("PackedMatMul", a);
      TF_Tensor x = tensor(float32, {2, 12}, ramp(24)), scale = tensor(float32, {5}, ones(5));
      auto attempt = [&](const std::vector<int8_t>& blob) {
        TF_Tensor w = tensor(int8, {int64_t(blob.size())}, blob);
        std::string why;
        CHECK(node.run(x, w, scale, &why).size() == 10 || why.find("expected") != std::string::npos);
      };
      for (size_t n = 0; n < l.blob.size(); n++) attempt(std::vector<int8_t>(l.blob.begin(), l.blob.begin() + int64_t(n)));
      for (size_t i = 0; i < l.blob.size(); i++)
        for (int value : {0, 1, 127, -128, -1, int(engine() % 256)}) {
          auto blob = l.blob;
          blob[i] = int8_t(value);
          attempt(blob);
        }
    }
}

// Threads that run one node at once, with weights that are replaced meanwhile, and a second node over the same weights.
void threads() {
  int before = living;
  {
    Node node("PackedMatMul"), other("PackedMatMul");
    std::vector<Layer> layers;
    std::vector<TF_Tensor> weights;
    for (int i = 0; i < 4; i++) {
      layers.push_back(pack(1 + i % 3, 150, 120, i));
      weights.push_back(tensor(int8, {int64_t(layers.back().blob.size())}, layers.back().blob));
    }
    std::atomic<int> wrong{0};
    std::vector<std::thread> workers;
    for (int t = 0; t < 4; t++)
      workers.emplace_back([&, t] {
        TF_Tensor scale = tensor(float32, {120}, ones(120));
        for (int i = 0; i < 60; i++) {
          size_t at = size_t(t + i) % 4;
          int rows = 1 + i % 3 * 5;
          TF_Tensor x = tensor(float32, {rows, 150}, ramp(rows * 150)), fresh = tensor(int8, weights[at].shape, layers[at].blob);
          wrong += !right((i % 2 ? node : other).run(x, i % 5 ? weights[at] : fresh, scale), ramp(rows * 150), layers[at]);
        }
      });
    for (auto& w : workers) w.join();
    CHECK(!wrong);
  }
  CHECK(living == before);
}

}  // namespace

int main() {
  values();
  damaged();
  threads();
  std::printf(failures ? "%d failures\n" : "tensorflow: all well\n", failures);
  return failures != 0;
}
