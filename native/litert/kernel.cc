#include "kernel.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "text.h"

namespace paring {
namespace litert {
namespace {

constexpr size_t line = 64;   // bytes of a cache line

bool holds(const std::vector<int>& all, int one) { return std::find(all.begin(), all.end(), one) != all.end(); }

std::vector<int> list(const TfLiteIntArray* a) { return a ? std::vector<int>(a->data, a->data + a->size) : std::vector<int>(); }

TfLiteStatus resize(TfLiteContext* c, int tensor, const std::vector<int>& dims) {
  TfLiteTensor& t = c->tensors[tensor];
  if (t.dims && dims_of(t) == dims) return kOk;
  auto* a = static_cast<TfLiteIntArray*>(std::malloc(sizeof(int32_t) * (dims.size() + 1)));
  if (!a) return kError;
  a->size = int32_t(dims.size());
  std::copy(dims.begin(), dims.end(), a->data);
  return c->ResizeTensor(c, &t, a);
}

}  // namespace

Kernel::Kernel(Claim* claim, Graph* g, const TfLiteDelegateParams& p, int threads) : threads_(threads) {
  if (!take(claim, g, p)) {
    if (failure_.empty()) failure_ = "the runtime's partition cannot be read";
  } else if (!order()) {
    failure_ = "the runtime's partition cannot be run in one go";
  }
}

// -- from the claim to steps ------------------------------------------------------------------------------------------

bool Kernel::take(Claim* claim, Graph* g, const TfLiteDelegateParams& p) {
  if (!g->refresh()) return false;
  std::vector<int> mine, leaves = list(p.output_tensors), broken;
  for (int node : list(p.nodes_to_replace)) {
    int position = g->position(node);
    if (position < 0) return false;
    mine.push_back(position);
  }
  std::sort(mine.begin(), mine.end());
  auto inside = [&](int position) { return std::binary_search(mine.begin(), mine.end(), position); };
  std::vector<int> left;
  for (int position : mine) {
    if (holds(claim->helpers, position)) {
      int t = g->output(position, 0);
      const auto& readers = g->readers[size_t(t)];
      if (!holds(leaves, t)) continue;
      if (!std::all_of(readers.begin(), readers.end(), inside)) {
        unused_.push_back(t);   // claimed nodes of other partitions
        continue;
      }
      // Nobody else reads it, so that the model itself must give it.
      Source s;
      Constant c;
      if (!find_source(*g, t, &s) || !unpack(*g, s, &c, &failure_) || c.type != g->tensor(t).type) return false;
      const char* data = static_cast<const char*>(c.data);
      constants_.emplace_back(t, std::vector<char>(data, data + g->tensor(t).bytes));
    } else if (auto product = claim->products.find(position); product != claim->products.end()) {
      add(*g, std::move(product->second), nullptr);
      claim->products.erase(product);
    } else {
      left.push_back(position);
    }
  }
  for (auto& island : claim->islands) {
    if (!island || !std::all_of(island->positions().begin(), island->positions().end(), [&](int q) { return holds(left, q); })) continue;
    for (int q : island->positions()) left.erase(std::find(left.begin(), left.end(), q));
    // A value that the model gives and somebody inside reads, too, was not known to leave.
    bool complete = std::all_of(island->positions().begin(), island->positions().end(),
                                [&](int q) { return !holds(leaves, g->output(q, 0)) || holds(island->outputs(), g->output(q, 0)); });
    if (complete) add(*g, nullptr, std::move(island));
    else if (!take_broken(*g, island->positions(), leaves)) return false;
    island.reset();
  }
  for (const auto& part : connected(*g, left))
    if (!take_broken(*g, part, leaves)) return false;
  return true;
}

// Builds an island anew, from other nodes or with other outputs than the claim's.
bool Kernel::take_broken(const Graph& g, const std::vector<int>& positions, const std::vector<int>& leaves) {
  std::vector<Operator> ops(positions.size());
  std::vector<const Operator*> all;
  std::vector<int> out;
  for (size_t i = 0; i < positions.size(); i++) {
    if (recognize(g, positions[i], 0, &ops[i], &failure_) != Verdict::taken) return false;
    all.push_back(&ops[i]);
    const auto& readers = g.readers[size_t(ops[i].y)];
    if (holds(leaves, ops[i].y) || !std::all_of(readers.begin(), readers.end(), [&](int r) { return holds(positions, r); })) out.push_back(ops[i].y);
  }
  auto island = Island::build(all, out, &failure_);
  if (!island) return false;
  add(g, nullptr, std::move(island));
  return true;
}

void Kernel::add(const Graph& g, std::unique_ptr<Product> product, std::unique_ptr<Island> island) {
  Step s;
  if (product) {
    s.inputs = {product->op().x};
    s.outputs = {product->op().y};
    s.name = g.name(product->op().position);
  } else {
    s.inputs = island->inputs();
    s.outputs = island->outputs();
    s.name = g.name(island->positions().front());
  }
  s.product = std::move(product);
  s.island = std::move(island);
  for (int t : s.inputs) values_[t].element = g.tensor(t).type == kInt8 ? 1 : 4;
  for (int t : s.outputs) values_[t].element = g.tensor(t).type == kInt8 ? 1 : 4;
  s.in.resize(s.inputs.size());
  s.out.resize(s.outputs.size());
  steps_.push_back(std::move(s));
}

// Steps in an order in which each reads what is made before; lifetimes of the values.
bool Kernel::order() {
  std::vector<int> made_here;
  for (const Step& s : steps_) made_here.insert(made_here.end(), s.outputs.begin(), s.outputs.end());
  std::vector<Step> ordered;
  std::vector<int> made;
  while (!steps_.empty()) {
    auto ready = std::find_if(steps_.begin(), steps_.end(), [&](const Step& s) {
      return std::all_of(s.inputs.begin(), s.inputs.end(), [&](int t) { return !holds(made_here, t) || holds(made, t); });
    });
    if (ready == steps_.end()) return false;
    int number = int(ordered.size());
    for (int t : ready->inputs) values_[t].last = number;
    for (int t : ready->outputs) {
      made.push_back(t);
      Value& v = values_[t];
      v.inside = true;   // until `prepare` sees that it leaves
      v.first = v.last = number;
    }
    ordered.push_back(std::move(*ready));
    steps_.erase(ready);
  }
  steps_.swap(ordered);
  return true;
}

// -- shapes and memory ------------------------------------------------------------------------------------------------

TfLiteStatus Kernel::fail(TfLiteContext* c, const std::string& where, const std::string& why) const {
  c->ReportError(c, "cannot run the sparse kernels for '%s': %s. Load the model without the delegate, or report it.", where.c_str(), why.c_str());
  return kError;
}

bool Kernel::bind(Step& s, std::string* reason) {
  std::vector<std::vector<int>> in, out;
  for (int t : s.inputs) in.push_back(values_[t].dims);
  if (in == s.bound && !in.empty()) return true;
  s.bound.clear();
  if (s.product) {
    Geometry g;
    if (!shape(s.product->op(), in[0], {}, &g, reason) || !s.product->prepare(g, threads_, reason)) return false;
    out = {g.y};
  } else if (!s.island->prepare(in, threads_, &out, reason)) {
    return false;
  }
  for (size_t i = 0; i < out.size(); i++) values_[s.outputs[i]].dims = out[i];
  s.bound = in;
  return true;
}

// Places the values inside so that those that live at once do not overlap: large ones first, each at the lowest offset
// that is free as long as it lives.
bool Kernel::place() {
  std::vector<Value*> inside, placed;
  for (auto& v : values_)
    if (v.second.inside) inside.push_back(&v.second);
  std::stable_sort(inside.begin(), inside.end(), [](const Value* a, const Value* b) { return a->bytes() > b->bytes(); });
  size_t end = 0;
  for (Value* v : inside) {
    std::vector<std::pair<size_t, size_t>> taken;
    for (const Value* o : placed)
      if (o->first <= v->last && v->first <= o->last) taken.emplace_back(o->offset, o->offset + o->bytes());
    std::sort(taken.begin(), taken.end());
    size_t at = 0;
    for (const auto& t : taken) {
      if (t.first >= at + v->bytes()) break;
      at = std::max(at, (t.second + line - 1) / line * line);
    }
    v->offset = at;
    end = std::max(end, at + v->bytes());
    placed.push_back(v);
  }
  end = (end + line - 1) / line * line;
  if (end > memory_bytes_) {
    memory_.reset();
    memory_.reset(static_cast<char*>(std::aligned_alloc(line, end)));
    memory_bytes_ = memory_ ? end : 0;
  }
  return end == 0 || memory_ != nullptr;
}

TfLiteStatus Kernel::prepare(TfLiteContext* c, TfLiteNode* node) {
  if (!failure_.empty()) return fail(c, "a partition", failure_);
  std::vector<int> leaves = list(node->outputs);
  for (auto& v : values_) {
    bool made = v.second.inside || holds(leaves, v.first);
    v.second.inside = made && !holds(leaves, v.first);
    if (!made) v.second.dims = dims_of(c->tensors[v.first]);
  }
  std::string why;
  for (Step& s : steps_)
    if (!bind(s, &why)) return fail(c, s.name, why);
  if (!place()) return fail(c, "a partition", "expected memory for the values between its layers, got none");
  for (int t : leaves)
    if (auto v = values_.find(t); v != values_.end() && resize(c, t, v->second.dims) != kOk) return kError;
  for (int t : unused_)
    if (resize(c, t, {0}) != kOk) return kError;
  return kOk;
}

TfLiteStatus Kernel::invoke(TfLiteContext* c, TfLiteNode*) {
  auto at = [&](int tensor) -> void* {
    const Value& v = values_.find(tensor)->second;
    return v.inside ? static_cast<void*>(memory_.get() + v.offset) : c->tensors[tensor].data;
  };
  for (auto& constant : constants_)
    if (void* to = c->tensors[constant.first].data) memcpy(to, constant.second.data(), constant.second.size());
  for (Step& s : steps_) {
    for (size_t i = 0; i < s.inputs.size(); i++) s.in[i] = at(s.inputs[i]);
    for (size_t i = 0; i < s.outputs.size(); i++) s.out[i] = at(s.outputs[i]);
    for (size_t i = 0; i < s.inputs.size(); i++)
      if (!s.in[i] && values_.find(s.inputs[i])->second.bytes()) return fail(c, s.name, "expected data in its inputs, got none");
    for (size_t i = 0; i < s.outputs.size(); i++)
      if (!s.out[i] && values_.find(s.outputs[i])->second.bytes()) return fail(c, s.name, "expected memory for its outputs, got none");
    if (s.product) s.product->run(s.in[0], s.out[0]);
    else s.island->run(s.in.data(), s.out.data());
  }
  return kOk;
}

}  // namespace litert
}  // namespace paring
