// Drives the delegate through a stand-in of the LiteRT runtime (runtime.h): claims, results, resizing, several interpreters
// in several threads, many lives, runtimes of another layout. Meant to run under sanitizers, too.
#include <sys/mman.h>

#include <functional>
#include <random>
#include <thread>

#include "runtime.h"

using namespace fake;

extern "C" {
TfLiteDelegate* tflite_plugin_create_delegate(const char* const* keys, const char* const* values, size_t count, void (*report)(const char*));
void tflite_plugin_destroy_delegate(TfLiteDelegate*);
}

namespace {

int failures = 0;
#define CHECK(what) \
  do { \
    if (!(what)) { \
      failures++; \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what); \
    } \
  } while (0)

thread_local std::string reported;

TfLiteDelegate* make(std::vector<std::pair<const char*, const char*>> options) {
  std::vector<const char*> keys, values;
  for (auto& o : options) keys.push_back(o.first), values.push_back(o.second);
  reported.clear();
  return tflite_plugin_create_delegate(keys.data(), values.data(), keys.size(), [](const char* m) { reported = m; });
}

struct Random {
  std::mt19937 engine{7};
  float real() { return std::normal_distribution<float>()(engine); }
  bool chance(double p) { return std::uniform_real_distribution<double>()(engine) < p; }
};

// Weights [rows][row] of which blocks of 16 rows keep one column in twenty.
template <class T> std::vector<T> sparse(int rows, int row, Random& r) {
  std::vector<T> w(size_t(rows) * size_t(row));
  for (int g = 0; g < rows; g += 16)
    for (int k = 0; k < row; k++)
      if (r.chance(0.05))
        for (int o = g; o < std::min(rows, g + 16); o++) w[size_t(o) * size_t(row) + size_t(k)] = sizeof(T) == 1 ? T(r.real() * 30) : T(r.real());
  return w;
}

// The constants of one model: two products with something else between them.
struct Model {
  enum Kind { f32, s8, qd8, conv, densify };
  Kind kind;
  int in = 512, hidden = 768, out = 512, side = 12;
  std::vector<float> w1, w2, bias;
  std::vector<int8_t> q1, q2;
  std::vector<int32_t> bias_s8;
  std::vector<float> scales1, scales2;
  std::vector<uint16_t> half;
  std::vector<int> segments, indices, order{0, 1};
  TfLiteLevel levels[2];
  TfLiteSparsity sparsity;
  TfLiteFullyConnectedParams fc = {kRelu, 0, false, false, 0};
  TfLiteConvParams point = {kSame, 1, 1, kRelu, 1, 1, 0}, wide = {kSame, 1, 1, kNoActivation, 1, 1, 0};

  explicit Model(Kind k) : kind(k) {
    Random r;
    if (kind == conv) in = 64, hidden = 128, out = 64;
    int taps = kind == conv ? 9 : 1;
    w1 = sparse<float>(hidden, in, r), w2 = sparse<float>(out, hidden * taps, r);
    q1 = sparse<int8_t>(hidden, in, r), q2 = sparse<int8_t>(out, hidden, r);
    for (int i = 0; i < std::max(hidden, out); i++) {
      bias.push_back(r.real()), bias_s8.push_back(int(r.real() * 100));
      scales1.push_back(0.01f + 0.001f * float(i % 7)), scales2.push_back(0.02f);
    }
    scales1.resize(size_t(hidden)), scales2.resize(size_t(out));
    if (kind == densify) encode();
  }

  // w1 as float16, rows dense and columns compressed; its values become what float16 holds of them.
  void encode() {
    segments = {0}, indices = {0};
    for (int o = 0; o < hidden; o++) {
      for (int k = 0; k < in; k++) {
        float& v = w1[size_t(o) * size_t(in) + size_t(k)];
        if (v == 0) continue;
        v = std::copysign(std::ldexp(1.0f, std::max(-6, std::ilogb(v))), v);
        half.push_back(uint16_t((v < 0 ? 0x8000 : 0) | (std::ilogb(v) + 15) << 10));
        indices.push_back(k);
      }
      segments.push_back(int(indices.size()) - 1);
    }
    indices[0] = int(indices.size()) - 1;
    segments.insert(segments.begin(), int(segments.size()));
    order.insert(order.begin(), 2);
    levels[0] = {0, hidden, nullptr, nullptr};
    levels[1] = {1, 0, reinterpret_cast<TfLiteIntArray*>(segments.data()), reinterpret_cast<TfLiteIntArray*>(indices.data())};
    sparsity = {reinterpret_cast<TfLiteIntArray*>(order.data()), nullptr, levels, 2};
  }

  void build(Runtime& rt, int batch) const {
    TfLiteType type = kind == s8 ? kInt8 : kFloat32;
    auto shape = [&](int channels) { return kind == conv ? std::vector<int>{batch, side, side, channels} : std::vector<int>{batch, channels}; };
    int x = rt.tensor(type, shape(in)), h = rt.tensor(type, shape(hidden)), n = rt.tensor(type, shape(hidden)), y = rt.tensor(type, shape(out));
    int b = type == kInt8 ? rt.tensor(kInt32, {hidden}, bias_s8.data()) : rt.tensor(kFloat32, {hidden}, bias.data());
    bool integer = kind == s8 || kind == qd8;
    int a, c;
    if (integer) {
      a = rt.tensor(kInt8, {hidden, in}, q1.data()), c = rt.tensor(kInt8, {out, hidden}, q2.data());
      rt.grid(a, scales1, 0), rt.grid(c, {scales2[0]}, 0);
    } else if (kind == conv) {
      a = rt.tensor(kFloat32, {hidden, 1, 1, in}, w1.data()), c = rt.tensor(kFloat32, {out, 3, 3, hidden}, w2.data());
    } else {
      a = rt.tensor(kFloat32, {hidden, in}, w1.data()), c = rt.tensor(kFloat32, {out, hidden}, w2.data());
    }
    if (kind == s8) {
      rt.grid(x, {0.05f}, 3), rt.grid(h, {0.6f}, -5), rt.grid(n, {0.6f}, 5), rt.grid(y, {1.5f}, 0);
    }
    if (kind == densify) {
      int stored = rt.tensor(kFloat16, {hidden, in}, half.data(), half.size() * 2), dense = rt.tensor(kFloat16, {hidden, in});
      rt.at(stored).sparsity = const_cast<TfLiteSparsity*>(&sparsity);
      a = rt.tensor(kFloat32, {hidden, in});
      rt.op(kDensify, {stored}, {dense}, nullptr);
      rt.op(kDequantize, {dense}, {a}, nullptr);
    }
    int code = kind == conv ? kConv2d : kFullyConnected;
    rt.op(code, {x, a, b}, {h}, kind == conv ? static_cast<const void*>(&point) : &fc);
    rt.op(kNegate, {h}, {n}, nullptr);
    rt.op(code, {n, c, -1}, {y}, kind == conv ? static_cast<const void*>(&wide) : &fc);
    rt.inputs = {x}, rt.outputs = {y};
  }
};

void fill(Runtime& rt, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  TfLiteTensor& x = rt.at(rt.inputs[0]);
  for (size_t i = 0; i < Runtime::count(x); i++) {
    float v = normal(engine);
    if (x.type == kInt8) static_cast<int8_t*>(x.data)[i] = int8_t(std::max(-128.f, std::min(127.f, v * 40)));
    else static_cast<float*>(x.data)[i] = v;
  }
}

// Largest difference, over the largest value (floats) or in quanta (integers).
double difference(Runtime& a, Runtime& b) {
  TfLiteTensor &p = a.at(a.outputs[0]), &q = b.at(b.outputs[0]);
  if (p.bytes != q.bytes) return 1e9;
  double most = 0, largest = 1e-30;
  for (size_t i = 0; i < Runtime::count(p); i++) {
    double u = p.type == kInt8 ? static_cast<int8_t*>(p.data)[i] : static_cast<float*>(p.data)[i];
    double v = q.type == kInt8 ? static_cast<int8_t*>(q.data)[i] : static_cast<float*>(q.data)[i];
    most = std::max(most, std::fabs(u - v)), largest = std::max(largest, std::fabs(u));
  }
  return p.type == kInt8 ? most : most / largest;
}

double tolerance(Model::Kind k) { return k == Model::s8 ? 1 : k == Model::qd8 ? 5e-3 : 1e-5; }

void run(Runtime& rt, unsigned seed) {
  if (!rt.allocate()) {
    fprintf(stderr, "%s\n", rt.error.c_str());
    CHECK(false);
    return;
  }
  fill(rt, seed);
  if (!rt.invoke()) fprintf(stderr, "%s\n", rt.error.c_str());
}

// With the delegate against the slow kernels, at three batch sizes one after the other.
void check_results(Model::Kind kind, const char* threads) {
  Model m(kind);
  Runtime ours, theirs;
  m.build(ours, 1), m.build(theirs, 1);
  TfLiteDelegate* d = make({{"num_threads", threads}, {"measure", "false"}});
  CHECK(d && ours.apply(d) == kOk);
  CHECK(ours.claimed() == 2);
  // Nothing is left that unpacks constants.
  for (int n : ours.plan) CHECK(ours.nodes[size_t(n)]->registration.builtin_code != kDensify && ours.nodes[size_t(n)]->registration.builtin_code != kDequantize);
  for (int batch : {1, 3, 1, 2}) {
    for (Runtime* rt : {&ours, &theirs}) {
      std::vector<int> dims(rt->at(rt->inputs[0]).dims->data, rt->at(rt->inputs[0]).dims->data + rt->at(rt->inputs[0]).dims->size);
      dims[0] = batch;
      rt->resize(rt->inputs[0], dims);
      run(*rt, unsigned(batch));
    }
    double e = difference(ours, theirs);
    if (!(e <= tolerance(kind))) fprintf(stderr, "kind %d, batch %d: %g\n", int(kind), batch, e);
    CHECK(e <= tolerance(kind));
  }
  CHECK(ours.error.empty());
  ours.resize(ours.inputs[0], kind == Model::conv ? std::vector<int>{1, 12, 12, 5} : std::vector<int>{1, 5});
  if (kind == Model::f32 || kind == Model::conv) {
    CHECK(!ours.allocate());
    CHECK(ours.error.find("expected") != std::string::npos);
  }
  // Kernels must go before their delegate.
  for (auto& n : ours.nodes)
    if (n->registration.free) n->registration.free(&ours.context, n->node.user_data), n->registration.free = nullptr;
  tflite_plugin_destroy_delegate(d);
}

void check_threads() {
  Model f(Model::f32), c(Model::conv);
  std::vector<std::thread> all;
  for (int t = 0; t < 4; t++)
    all.emplace_back([&, t] {
      const Model& m = t % 2 ? c : f;
      TfLiteDelegate* d = make({{"num_threads", t < 2 ? "2" : "1"}, {"measure", t == 0 ? "true" : "false"}});
      {
        Runtime theirs, ours;
        m.build(theirs, 1), m.build(ours, 1);
        bool fine = d && ours.apply(d) == kOk;
        for (unsigned i = 0; i < 5; i++) {
          run(ours, i), run(theirs, i);
          fine = fine && difference(ours, theirs) <= 1e-5;
        }
        CHECK(fine);
      }
      tflite_plugin_destroy_delegate(d);
    });
  for (auto& t : all) t.join();
}

void check_lives(int lives) {
  Model m(Model::densify);
  for (int i = 0; i < lives; i++) {
    TfLiteDelegate* d = make({{"measure", i % 8 ? "false" : "true"}});
    {
      Runtime rt;
      m.build(rt, 1);
      CHECK(rt.apply(d) == kOk);
      if (i % 16 == 0) run(rt, 1);
    }
    tflite_plugin_destroy_delegate(d);
  }
}

void check_options() {
  CHECK(!make({{"sparsity", "0.5"}}) && reported.find("'sparsity'") != std::string::npos && reported.find("sparsity_threshold") != std::string::npos);
  for (auto bad : {std::make_pair("sparsity_threshold", "2"), {"sparsity_threshold", "x"}, {"num_threads", "1.5"}, {"verbose", "maybe"}, {"isa", "sse9"}, {"measure", ""}})
    CHECK(!make({bad}) && reported.find(bad.first) != std::string::npos && reported.find("expected") != std::string::npos);
  tflite_plugin_destroy_delegate(nullptr);
  TfLiteDelegate* d = make({{"isa", "portable"}, {"num_threads", "-1"}, {"verbose", "0"}});
  CHECK(d != nullptr);
  tflite_plugin_destroy_delegate(d);
}

// Whatever a runtime of another layout would make of ours: refused, without a crash.
void check_hostile() {
  Model m(Model::f32);
  TfLiteDelegate* d = make({{"measure", "false"}});
  void* nowhere = reinterpret_cast<void*>(uintptr_t(0x10));
  void* far_away = mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  std::vector<std::function<void(Runtime&)>> damages = {
      [&](Runtime& r) { r.context.tensors = static_cast<TfLiteTensor*>(nowhere); },
      [&](Runtime& r) { r.context.tensors = static_cast<TfLiteTensor*>(far_away); },
      [&](Runtime& r) { r.context.tensors_size = size_t(1) << 40; },
      [&](Runtime& r) { r.context.tensors_size = size_t(1) << 22; },
      [&](Runtime& r) { r.context.recommended_num_threads = 0x7f001234; },
      [&](Runtime& r) { memmove(&r.context.GetExecutionPlan, &r.context.tensors, 9 * 8); },
      [&](Runtime& r) { memcpy(&r.context.ResizeTensor, &nowhere, 8); },
      [&](Runtime& r) { r.context.GetExecutionPlan = nullptr; },
      [&](Runtime& r) { r.at(1).type = TfLiteType(1000); },
      [&](Runtime& r) { r.at(1).allocation_type = TfLiteAllocation(-5); },
      [&](Runtime& r) { std::free(r.at(1).dims), r.at(1).dims = static_cast<TfLiteIntArray*>(far_away); },
      [&](Runtime& r) { r.at(5).bytes++; },
      [&](Runtime& r) { r.at(1).dims->data[0] = -7; },
      [&](Runtime& r) { r.at(1).name = static_cast<const char*>(nowhere); },
      [&](Runtime& r) { r.at(5).quantization = {1, far_away}; },
      [&](Runtime& r) { r.at(5).quantization.type = 77; },
      [&](Runtime& r) { r.at(5).sparsity = static_cast<TfLiteSparsity*>(nowhere); },
      [&](Runtime& r) { r.plan[1] = 99; },
      [&](Runtime& r) { r.plan[1] = -3; },
      [&](Runtime& r) { r.nodes[0]->node.inputs->data[0] = 12345; },
      [&](Runtime& r) { std::free(r.nodes[1]->node.outputs), r.nodes[1]->node.outputs = static_cast<TfLiteIntArray*>(far_away); },
      [&](Runtime& r) { r.nodes[1]->registration.builtin_code = -1; },
      [&](Runtime& r) { r.nodes[1]->registration.version = 1 << 20; },
  };
  for (size_t i = 0; i < damages.size(); i++) {
    Runtime rt;
    m.build(rt, 1);
    damages[i](rt);
    bool refused = rt.apply(d) == kError;
    // What can still be reported is; the first damages are to what reports.
    if (i < 5 || i > 7) CHECK(rt.error.find("ai-edge-litert 2.3.0") != std::string::npos);
    if (!refused) fprintf(stderr, "damage %zu was not seen\n", i);
    CHECK(refused);
    for (auto& t : rt.tensors) if (t.dims == far_away) t.dims = nullptr;
    for (auto& n : rt.nodes) if (n->node.outputs == far_away) n->node.outputs = nullptr;
  }
  munmap(far_away, 4096);
  Runtime whole;
  m.build(whole, 1);
  CHECK(whole.apply(d) == kOk && whole.claimed() == 2);
  for (auto& n : whole.nodes)
    if (n->registration.free) n->registration.free(&whole.context, n->node.user_data), n->registration.free = nullptr;
  tflite_plugin_destroy_delegate(d);
}

// Sparse encodings that contradict themselves: the product is left alone, the other one is not.
void check_encodings() {
  const std::vector<std::function<void(Model&)>> damages = {
      [](Model& m) { m.indices[7] = m.in; },
      [](Model& m) { m.indices[7] = -1; },
      [](Model& m) { m.segments[9] = m.segments[8] - 1; },
      [](Model& m) { m.segments[9] = 1 << 30; },
      [](Model& m) { m.segments[0] = 5; },
      [](Model& m) { m.sparsity.level_count = 3; },
      [](Model& m) { m.order[2] = 0; },
      [](Model& m) { m.order[2] = 7; },
      [](Model& m) { m.levels[0].dense_size++; },
      [](Model& m) { m.levels[1].format = 2; },
      [](Model& m) { m.levels[1].indices = nullptr; },
      [](Model& m) { m.half.pop_back(); },
      [](Model& m) { m.half.push_back(0); },
  };
  for (size_t i = 0; i <= damages.size(); i++) {
    Model m(Model::densify);
    if (i < damages.size()) damages[i](m);
    TfLiteDelegate* d = make({{"measure", "false"}});
    {
      Runtime rt;
      m.build(rt, 1);
      bool right = rt.apply(d) == kOk && rt.claimed() == (i < damages.size() ? 1 : 2);
      if (!right) fprintf(stderr, "damage %zu of the encoding\n", i);
      CHECK(right);
    }
    tflite_plugin_destroy_delegate(d);
  }
}

// Weights that no kernel takes stay with the runtime, and so do dense ones.
void check_left_alone() {
  for (float bad : {INFINITY, NAN, 1.0f}) {
    Model m(Model::f32);
    if (bad == 1.0f) std::fill(m.w1.begin(), m.w1.end(), bad), std::fill(m.w2.begin(), m.w2.end(), bad);
    else m.w1[m.w1.size() - 1] = m.w2[5] = bad;
    Runtime rt;
    m.build(rt, 1);
    TfLiteDelegate* d = make({});
    CHECK(rt.apply(d) == kOk && rt.claimed() == 0 && rt.plan.size() == 3);
    tflite_plugin_destroy_delegate(d);
  }
}

}  // namespace

int main(int argc, char** argv) {
  int lives = argc > 1 ? atoi(argv[1]) : 2000;
  check_options();
  for (auto kind : {Model::f32, Model::s8, Model::qd8, Model::conv, Model::densify})
    for (const char* threads : {"1", "2"}) check_results(kind, threads);
  check_left_alone();
  check_encodings();
  check_hostile();
  check_threads();
  check_lives(lives);
  printf(failures ? "%d failures\n" : "host: all well\n", failures);
  return failures != 0;
}
