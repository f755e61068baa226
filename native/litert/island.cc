#include "island.h"

#include <algorithm>
#include <map>

namespace paring {
namespace litert {
namespace {

RegionOp region_op(const Operator& op) {
  RegionOp r = {};
  switch (op.kind) {
    case Operator::Kind::product: r.kind = RegionOp::Kind::conv; break;
    case Operator::Kind::depthwise: r.kind = RegionOp::Kind::depthwise; break;
    case Operator::Kind::add: r.kind = RegionOp::Kind::add; break;
    case Operator::Kind::pad: r.kind = RegionOp::Kind::pad; break;
  }
  r.conv = op.conv;
  r.before_h = op.before_h, r.after_h = op.after_h, r.before_w = op.before_w, r.after_w = op.after_w;
  r.low = op.low, r.high = op.high;
  return r;
}

}  // namespace

std::unique_ptr<Island> Island::build(const std::vector<const Operator*>& ops, const std::vector<int>& leaves, std::string* reason) {
  std::unique_ptr<Island> island(new Island);
  std::map<int, int> number;   // tensor -> value of the region
  auto value = [&](int tensor) { return number.emplace(tensor, int(number.size())).first->second; };
  std::vector<RegionOp> region;
  std::vector<int> inputs, outputs, made;
  auto read = [&](int tensor) {
    if (std::find(made.begin(), made.end(), tensor) == made.end() &&
        std::find(island->inputs_.begin(), island->inputs_.end(), tensor) == island->inputs_.end()) {
      island->inputs_.push_back(tensor);
      inputs.push_back(value(tensor));
    }
    return value(tensor);
  };
  for (const Operator* op : ops) {
    RegionOp r = region_op(*op);
    r.x = read(op->x);
    r.x2 = op->x2 >= 0 ? read(op->x2) : -1;
    r.y = value(op->y);
    made.push_back(op->y);
    region.push_back(r);
    island->positions_.push_back(op->position);
    if (std::find(leaves.begin(), leaves.end(), op->y) != leaves.end()) {
      island->outputs_.push_back(op->y);
      outputs.push_back(r.y);
    }
  }
  island->region_.reset(Region::create(region, inputs, outputs, reason));
  return island->region_ ? std::move(island) : nullptr;
}

bool Island::prepare(const std::vector<std::vector<int>>& inputs, int threads, std::vector<std::vector<int>>* outputs, std::string* reason) {
  std::vector<Shape> in, out;
  for (const std::vector<int>& d : inputs) {
    if (d.size() != 4) {
      *reason = "expected images";
      return false;
    }
    in.push_back({d[0], d[1], d[2], d[3]});
  }
  // Nothing is to be computed for a batch of no images; the shapes of one tell those of none.
  empty_ = std::any_of(in.begin(), in.end(), [](const Shape& s) { return s.n == 0; });
  if (empty_)
    for (Shape& s : in) s.n = 1;
  if (!region_->prepare(in, threads, &out, reason)) return false;
  outputs->clear();
  for (const Shape& s : out) outputs->push_back({empty_ ? 0 : s.n, s.h, s.w, s.c});
  return true;
}

void Island::run(const void* const* inputs, void* const* outputs) const {
  if (!empty_) region_->run(inputs, outputs);
}

}  // namespace litert
}  // namespace paring
