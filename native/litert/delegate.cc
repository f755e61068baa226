// The entry points that LiteRT's load_delegate looks for, and what the runtime calls behind them.
#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <string>

#include "claim.h"
#include "kernel.h"
#include "layout.h"
#include "options.h"
#include "text.h"

namespace paring {
namespace litert {
namespace {

// The core's instruction set is one for the process. Who asks for another one has it to himself meanwhile; what was packed
// and planned keeps its own.
class IsaScope {
 public:
  explicit IsaScope(const std::string& isa) {
    if (isa.empty()) {
      shared_ = std::shared_lock<std::shared_mutex>(mutex());
    } else {
      own_ = std::unique_lock<std::shared_mutex>(mutex());
      before_ = paring_isa();
      paring_set_isa(isa.c_str());
    }
  }
  ~IsaScope() {
    if (own_.owns_lock()) paring_set_isa(before_.c_str());
  }

 private:
  static std::shared_mutex& mutex() {
    static std::shared_mutex m;
    return m;
  }
  std::shared_lock<std::shared_mutex> shared_;
  std::unique_lock<std::shared_mutex> own_;
  std::string before_;
};

struct Delegate {
  TfLiteDelegate base = {};   // what the runtime has; its `data` is this
  Options options;
  // While the runtime makes kernels of a claim: both stand in `take_over`'s frame.
  Claim* claim = nullptr;
  Graph* graph = nullptr;
  int threads = 1;
};

struct Made { Delegate* delegate; std::unique_ptr<Kernel> kernel; };

TfLiteStatus refuse(TfLiteContext* c, const char* why) {
  c->ReportError(c, "cannot apply the paring delegate: %s. Load the model without it, or report it.", why);
  return kError;
}

// Nothing may be thrown into the runtime, which may be built without exceptions.
template <class F> TfLiteStatus guarded(TfLiteContext* c, F f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return refuse(c, "expected memory, got none");
  } catch (const std::exception& e) {
    return refuse(c, e.what());
  }
}

void* init(TfLiteContext*, const char* buffer, size_t) {
  auto* p = reinterpret_cast<const TfLiteDelegateParams*>(buffer);
  auto* d = static_cast<Delegate*>(p->delegate->data);
  try {
    std::unique_ptr<Made> made(new Made{d, nullptr});
    made->kernel.reset(new Kernel(d->claim, d->graph, *p, d->threads));
    return made.release();
  } catch (const std::exception&) {
    return nullptr;   // `prepare` tells
  }
}

void release(TfLiteContext*, void* made) { delete static_cast<Made*>(made); }

TfLiteStatus prepare(TfLiteContext* c, TfLiteNode* node) {
  auto* made = static_cast<Made*>(node->user_data);
  if (!made) return refuse(c, "expected memory, got none");
  return guarded(c, [&] {
    IsaScope scope(made->delegate->options.isa);
    return made->kernel->prepare(c, node);
  });
}

TfLiteStatus invoke(TfLiteContext* c, TfLiteNode* node) {
  return guarded(c, [&] { return static_cast<Made*>(node->user_data)->kernel->invoke(c, node); });
}

// The delegate's Prepare: called for each subgraph when the interpreter is built.
TfLiteStatus take_over(TfLiteContext* c, TfLiteDelegate* base) {
  auto* d = static_cast<Delegate*>(base->data);
  Layout layout;
  try {
    layout = check_layout(c);
  } catch (const std::exception& e) {
    layout.unexpected = e.what();
  }
  if (!layout.unexpected.empty()) {
    std::string why = text("cannot apply the paring delegate for this runtime: expected the structures of %s, got another layout: %s. "
                           "Load the model without the delegate.", checked_versions, layout.unexpected.c_str());
    if (layout.can_report) c->ReportError(c, "%s", why.c_str());
    else fprintf(stderr, "%s\n", why.c_str());
    return kError;
  }
  return guarded(c, [&] {
    IsaScope scope(d->options.isa);
    Graph graph;
    if (!graph.read(c)) return refuse(c, "the runtime does not tell its plan");
    d->threads = d->options.threads > 0 ? d->options.threads : c->recommended_num_threads > 0 ? c->recommended_num_threads : 1;
    Claim claim = decide(graph, d->options, d->threads);
    std::unique_ptr<char[]> memory(new char[sizeof(int32_t) * (claim.marked.size() + 1)]);
    auto* nodes = reinterpret_cast<TfLiteIntArray*>(memory.get());
    nodes->size = 0;
    for (size_t p = 0; p < claim.marked.size(); p++)
      if (claim.marked[p]) nodes->data[nodes->size++] = graph.nodes[p].index;
    if (nodes->size == 0) return kOk;
    TfLiteRegistration r = {};
    r.init = init, r.free = release, r.prepare = prepare, r.invoke = invoke;
    r.builtin_code = kDelegateOperator;
    r.custom_name = "ParingSparse";
    r.version = 1;
    d->claim = &claim, d->graph = &graph;
    TfLiteStatus status = c->ReplaceNodeSubsetsWithDelegateKernels(c, r, nodes, base);
    d->claim = nullptr, d->graph = nullptr;
    return status;
  });
}

}  // namespace
}  // namespace litert
}  // namespace paring

extern "C" {

// Options come as strings. Null where one is not known or its value cannot be: `report_error` says which.
PARING_API paring::litert::TfLiteDelegate* tflite_plugin_create_delegate(const char* const* keys, const char* const* values, size_t count,
                                                                          void (*report_error)(const char*)) {
  using namespace paring::litert;
  std::string message = "cannot make the delegate: expected memory, got none";
  try {
    std::unique_ptr<Delegate> d(new Delegate);
    if (read_options(keys, values, count, &d->options, &message)) {
      d->base.data = d.get();
      d->base.Prepare = take_over;
      d->base.flags = kAllowDynamicTensors;
      return &d.release()->base;
    }
  } catch (const std::exception&) {
  }
  if (report_error) report_error(message.c_str());
  return nullptr;
}

// Python's load_delegate calls it with null, too, where none was made.
PARING_API void tflite_plugin_destroy_delegate(paring::litert::TfLiteDelegate* d) {
  if (d) delete static_cast<paring::litert::Delegate*>(d->data);
}

}  // extern "C"
