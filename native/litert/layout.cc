#include "layout.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <unordered_set>

#include "text.h"

namespace paring {
namespace litert {
namespace {

constexpr size_t most_tensors = size_t(1) << 24;
constexpr int most_rank = 64;

// Whether addresses can be read: the system is asked to copy a byte of each page into a pipe, which it refuses without a
// signal where the page is not there or not readable.
class Memory {
 public:
  Memory() {
    if (pipe2(pipe_, O_CLOEXEC | O_NONBLOCK) != 0) pipe_[0] = pipe_[1] = -1;
  }
  ~Memory() {
    for (int end : pipe_)
      if (end >= 0) close(end);
  }
  Memory(const Memory&) = delete;

  bool works() const { return pipe_[0] >= 0; }
  bool readable(const void* p, size_t bytes) {
    uintptr_t first = reinterpret_cast<uintptr_t>(p), last = first + (bytes ? bytes - 1 : 0);
    if (last < first) return false;
    for (uintptr_t page = first / page_; page <= last / page_; page++) {
      if (seen_.count(page)) continue;
      char byte;
      // By number: sanitizers that stand in for write() would look at the byte, which may be anything of that page.
      if (syscall(SYS_write, pipe_[1], page * page_, size_t(1)) != 1 || read(pipe_[0], &byte, 1) != 1) return false;
      seen_.insert(page);
    }
    return true;
  }
  template <class T> bool readable(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % alignof(T) == 0 && readable(static_cast<const void*>(p), sizeof(T));
  }
  // A LiteRT array: a length, then as many numbers.
  template <class A> bool array(const A* a, int most) {
    return reinterpret_cast<uintptr_t>(a) % 4 == 0 && readable(static_cast<const void*>(a), 4) && a->size >= 0 && a->size <= most &&
           readable(static_cast<const void*>(a), 4 + 4 * size_t(a->size));
  }

 private:
  int pipe_[2];
  const uintptr_t page_ = uintptr_t(sysconf(_SC_PAGESIZE));
  std::unordered_set<uintptr_t> seen_;
};

template <class F> const void* address(F f) { return reinterpret_cast<const void*>(f); }

// Functions live in a loaded library; the context's are all of one.
bool is_code(const void* f, const void** base) {
  Dl_info info;
  if (!f || !dladdr(f, &info) || !info.dli_fbase) return false;
  *base = info.dli_fbase;
  return true;
}

size_t type_size(TfLiteType t) {
  switch (t) {
    case kFloat32: case kInt32: case kUInt32: return 4;
    case kInt64: case kFloat64: case kUInt64: case kComplex64: return 8;
    case kUInt8: case kInt8: case kBool: return 1;
    case kInt16: case kUInt16: case kFloat16: return 2;
    default: return 0;   // strings, resources, packed numbers
  }
}

std::string check_context(Memory& m, TfLiteContext* c, bool* can_report) {
  if (!m.readable(c)) return "the context cannot be read";
  const struct { const char* name; const void* f; } functions[] = {
      {"GetExecutionPlan", address(c->GetExecutionPlan)}, {"ResizeTensor", address(c->ResizeTensor)},
      {"ReportError", address(c->ReportError)}, {"AddTensors", address(c->AddTensors)},
      {"GetNodeAndRegistration", address(c->GetNodeAndRegistration)},
      {"ReplaceNodeSubsetsWithDelegateKernels", address(c->ReplaceNodeSubsetsWithDelegateKernels)}};
  const void* home = nullptr;
  for (const auto& f : functions) {
    const void* base;
    if (!is_code(f.f, &base)) return text("the context's %s is not a function", f.name);
    if (home && base != home) return text("the context's %s belongs to another library than its neighbours", f.name);
    home = base;
  }
  *can_report = true;
  if (c->tensors_size > most_tensors) return text("the context has %zu tensors", c->tensors_size);
  if (c->tensors_size && (reinterpret_cast<uintptr_t>(c->tensors) % 8 || !m.readable(c->tensors, c->tensors_size * sizeof(TfLiteTensor))))
    return "the context's tensors cannot be read";
  if (c->recommended_num_threads < -1 || c->recommended_num_threads > 4096)
    return text("the context recommends %d threads", c->recommended_num_threads);
  return "";
}

std::string check_tensor(Memory& m, const TfLiteTensor& t, int index) {
  if (t.type < 0 || t.type > 32) return text("tensor %d has type %d", index, t.type);
  if (t.allocation_type < 0 || t.allocation_type > 16) return text("tensor %d has allocation type %d", index, t.allocation_type);
  if (t.quantization.type < 0 || t.quantization.type > 8) return text("tensor %d has quantization type %d", index, t.quantization.type);
  if (t.name && !m.readable(static_cast<const void*>(t.name), 1)) return text("tensor %d has a name that cannot be read", index);
  if (t.dims_signature && !m.array(t.dims_signature, most_rank)) return text("tensor %d has a signature that cannot be read", index);
  if (t.quantization.type == 1 && t.quantization.params && !m.readable(static_cast<const TfLiteAffine*>(t.quantization.params)))
    return text("tensor %d has a grid that cannot be read", index);
  if (t.sparsity && !m.readable(t.sparsity)) return text("tensor %d has a sparse encoding that cannot be read", index);
  if (!t.dims) return t.type == kNoType || t.bytes == 0 ? "" : text("tensor %d has no shape", index);
  if (!m.array(t.dims, most_rank)) return text("tensor %d has a shape that cannot be read", index);
  size_t elements = 1;
  for (int i = 0; i < t.dims->size; i++) {
    if (t.dims->data[i] < -1) return text("tensor %d has dimension %d", index, t.dims->data[i]);
    elements *= size_t(t.dims->data[i] < 0 ? 0 : t.dims->data[i]);
  }
  bool plain = type_size(t.type) && !t.sparsity && t.data && t.allocation_type == kMappedConstant;
  if (plain && t.bytes != elements * type_size(t.type))
    return text("tensor %d has %zu bytes for %zu elements of type %d", index, t.bytes, elements, t.type);
  return "";
}

bool indices_fit(const TfLiteIntArray* a, size_t tensors) {
  for (int i = 0; i < a->size; i++)
    if (a->data[i] < -1 || a->data[i] >= int(tensors)) return false;
  return true;
}

std::string check_node(Memory& m, TfLiteContext* c, int index) {
  TfLiteNode* node = nullptr;
  TfLiteRegistration* r = nullptr;
  if (index < 0) return text("the plan names node %d", index);
  if (c->GetNodeAndRegistration(c, index, &node, &r) != kOk) return text("node %d cannot be had", index);
  if (!m.readable(node) || !m.readable(r)) return text("node %d cannot be read", index);
  const int most = int(most_tensors);
  if (!m.array(node->inputs, most) || !m.array(node->outputs, most)) return text("node %d has inputs or outputs that cannot be read", index);
  if (!indices_fit(node->inputs, c->tensors_size) || !indices_fit(node->outputs, c->tensors_size))
    return text("node %d names a tensor that does not exist", index);
  if (r->builtin_code < 0 || r->builtin_code > 4096) return text("node %d has operator %d", index, r->builtin_code);
  if (r->version < 0 || r->version > 4096) return text("node %d has version %d", index, r->version);
  if (r->custom_name && !m.readable(static_cast<const void*>(r->custom_name), 1)) return text("node %d has a name that cannot be read", index);
  for (const void* f : {address(r->init), address(r->free), address(r->prepare), address(r->invoke)})
    if (f && !m.readable(f, 1)) return text("node %d has a function that is none", index);
  return "";
}

}  // namespace

Layout check_layout(TfLiteContext* c) {
  Layout layout;
  std::string& wrong = layout.unexpected;
  Memory m;
  if (!m.works()) {
    wrong = "memory cannot be looked at without a pipe (too many open files?)";
    return layout;
  }
  wrong = check_context(m, c, &layout.can_report);
  if (!wrong.empty()) return layout;
  TfLiteIntArray* plan = nullptr;
  if (c->GetExecutionPlan(c, &plan) != kOk || !m.array(plan, int(most_tensors))) wrong = "the plan cannot be read";
  for (size_t i = 0; i < c->tensors_size && wrong.empty(); i++) wrong = check_tensor(m, c->tensors[i], int(i));
  for (int i = 0; wrong.empty() && i < plan->size; i++) wrong = check_node(m, c, plan->data[i]);
  return layout;
}

}  // namespace litert
}  // namespace paring
