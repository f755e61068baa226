#include "graph.h"

namespace paring {
namespace litert {

bool Graph::read(TfLiteContext* c) {
  context = c;
  TfLiteIntArray* plan = nullptr;
  if (c->GetExecutionPlan(c, &plan) != kOk || !plan) return false;
  producer.assign(c->tensors_size, -1);
  readers.assign(c->tensors_size, {});
  nodes.clear();
  // The runtime may reuse the memory of the plan with the next call.
  std::vector<int> order(plan->data, plan->data + plan->size);
  for (int index : order) {
    Node n = {index, nullptr, nullptr};
    if (c->GetNodeAndRegistration(c, index, &n.node, &n.registration) != kOk) return false;
    int here = size();
    nodes.push_back(n);
    for (int i = 0; i < n.node->inputs->size; i++)
      if (int t = n.node->inputs->data[i]; t >= 0 && (readers[size_t(t)].empty() || readers[size_t(t)].back() != here)) readers[size_t(t)].push_back(here);
    for (int i = 0; i < n.node->outputs->size; i++)
      if (int t = n.node->outputs->data[i]; t >= 0) producer[size_t(t)] = here;
    if (size_t(index) >= position_.size()) position_.resize(size_t(index) + 1, -1);
    position_[size_t(index)] = here;
  }
  return true;
}

bool Graph::refresh() {
  for (Node& n : nodes)
    if (context->GetNodeAndRegistration(context, n.index, &n.node, &n.registration) != kOk) return false;
  return true;
}

int Graph::position(int node_index) const {
  return node_index >= 0 && size_t(node_index) < position_.size() ? position_[size_t(node_index)] : -1;
}

int Graph::input(int position, int which) const {
  const TfLiteIntArray* a = nodes[size_t(position)].node->inputs;
  return which < a->size ? a->data[which] : -1;
}

int Graph::output(int position, int which) const {
  const TfLiteIntArray* a = nodes[size_t(position)].node->outputs;
  return which < a->size ? a->data[which] : -1;
}

std::string Graph::name(int position) const {
  constexpr size_t longest = 60;
  int t = output(position, 0);
  std::string all = t >= 0 && tensor(t).name ? tensor(t).name : "";
  // A fused operator is named by everything that went into it; the first part says enough.
  all = all.substr(0, all.find(';'));
  for (char& c : all)
    if (c < ' ' || c == 127) c = '?';
  return all.size() <= longest ? all : "..." + all.substr(all.size() - (longest - 3));
}

std::vector<int> Graph::turns(const std::vector<bool>& marked) const {
  std::vector<int> turn(nodes.size(), -1);
  std::vector<int> missing(nodes.size(), 0);   // inputs that are still to be made
  for (int p = 0; p < size(); p++)
    for (int i = 0; i < inputs(p); i++)
      if (int t = input(p, i); t >= 0 && producer[size_t(t)] >= 0) missing[size_t(p)]++;
  int left = size();
  for (int number = 0; left > 0; number++) {
    int kind = -1;   // of this turn: that of the first node that is ready
    for (bool again = true; again;) {
      again = false;
      for (int p = 0; p < size(); p++) {
        if (turn[size_t(p)] >= 0 || missing[size_t(p)] > 0 || (kind >= 0 && kind != int(marked[size_t(p)]))) continue;
        kind = marked[size_t(p)];
        turn[size_t(p)] = number;
        left--;
        again = true;
        for (int o = 0; o < nodes[size_t(p)].node->outputs->size; o++) {
          int t = output(p, o);
          if (t < 0) continue;
          for (int reader : readers[size_t(t)])
            for (int i = 0; i < inputs(reader); i++)
              if (input(reader, i) == t) missing[size_t(reader)]--;
        }
      }
    }
    if (kind < 0) break;   // a cycle, which the runtime would have refused
  }
  return turn;
}

std::vector<int> dims_of(const TfLiteTensor& t) {
  return t.dims ? std::vector<int>(t.dims->data, t.dims->data + t.dims->size) : std::vector<int>();
}

int64_t elements_of(const std::vector<int>& dims) {
  int64_t n = 1;
  for (int d : dims) n *= d > 0 ? d : 0;
  return n;
}

}  // namespace litert
}  // namespace paring
