#include "claim.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "expect.h"
#include "measure.h"
#include "text.h"

namespace paring {
namespace litert {
namespace {

// What one operator alone is expected to take leaves out that its values come from far caches in a network: 10 to 15 % in
// ResNet-50. So an island of more than a chain of 1x1 convolutions may look that much worse.
constexpr double together = 0.85;
constexpr double several = 1.35;  // the same with several threads, seen with networks of small layers
constexpr double margin = 1.1;    // what must be won, expected against expected
constexpr double measured_margin = 1.05;   // measured with warm caches, against expected
constexpr int usual_rows = 64, usual_side = 56;   // where shapes are not known yet
constexpr int most_rounds = 4;    // of cutting islands where the runtime would cut them

struct Candidate {
  Verdict verdict = Verdict::other;
  std::string reason;                 // why not
  Operator op;                        // what may stand in an island; of a product it is in `product`
  std::unique_ptr<Product> product;
  Geometry geometry;
  double dense = 0, own = 0;          // seconds by the runtime, and by our kernel alone
  bool claimed = false, in_island = false;
  bool guessed = false;               // `geometry` is: the shapes are not known yet

  const Operator& what() const { return product ? product->op() : op; }
  bool wins() const { return product && own * margin + partition_seconds < dense; }
  // What it takes when it is left out of an island.
  double otherwise() const { return wins() ? own : dense; }
};

std::string pattern(const paring_layer_info& info) {
  if (info.block_outputs == 1 && info.block_inputs == 1) return "single zeros";
  double full = info.stored ? double(info.nonzeros) / double(info.stored) : 1;
  return text("%d x %d blocks, %.0f %% full", info.block_outputs, info.block_inputs, 100 * full);
}

class Decision {
 public:
  Decision(const Graph& g, const Options& o, int threads) : g_(g), options_(o), threads_(threads), all_(size_t(g.size())) {}

  Claim run() {
    read();
    if (std::none_of(all_.begin(), all_.end(), [](const Candidate& c) { return c.product != nullptr; })) return finish();
    for (const auto& members : parts(possible_members())) try_islands(members);
    for (int p = 0; p < g_.size(); p++) try_alone(p);
    cut_as_the_runtime_does();
    return finish();
  }

 private:
  Candidate& at(int p) { return all_[size_t(p)]; }

  void read() {
    for (int p = 0; p < g_.size(); p++) {
      Candidate& c = at(p);
      c.verdict = recognize(g_, p, options_.threshold, &c.op, &c.reason);
      if (c.verdict != Verdict::taken) continue;
      std::vector<int> x = dims_of(g_.tensor(c.op.x)), x2 = c.op.x2 >= 0 ? dims_of(g_.tensor(c.op.x2)) : std::vector<int>();
      c.guessed = guess(c.op, &x);
      if (!shape(c.op, x, x2, &c.geometry, &c.reason)) {
        c.verdict = Verdict::not_taken;
        continue;
      }
      if (c.op.kind != Operator::Kind::product) {
        c.dense = folded(p) ? 0 : estimate_other(c.op, c.geometry, threads_);
        continue;
      }
      c.dense = estimate_dense(c.op, c.geometry, threads_);
      c.product = Product::pack(std::move(c.op), c.geometry, &c.reason);
      if (!c.product) {
        c.verdict = Verdict::not_taken;
        continue;
      }
      c.own = c.product->estimate(c.geometry, threads_);
      if (c.guessed && c.product->op().form != Operator::Form::image) check_one_row(&c);
    }
  }

  // Shapes that only running will tell (dimensions of -1, or what no reader can take). Something usual stands for them.
  bool guess(const Operator& op, std::vector<int>* x) const {
    const TfLiteIntArray* signature = g_.tensor(op.x).dims_signature;
    bool product = op.kind == Operator::Kind::product;
    if (product && op.form != Operator::Form::image) {
      Geometry ignored;
      std::string why;
      if (op.matrices() != 1 || shape(op, *x, {}, &ignored, &why)) return false;
      *x = std::vector<int>(std::max<size_t>(2, op.batch.size() + 2), 1);
      (*x)[x->size() - 2] = usual_rows, x->back() = op.conv.inputs;
      return true;
    }
    if (!signature || signature->size != 4 || x->size() != 4 || (signature->data[1] >= 0 && signature->data[2] >= 0)) return false;
    for (size_t d : {1, 2})
      if (signature->data[d] < 0) (*x)[d] = usual_side;
    return true;
  }

  // Rows of unknown number: one alone must win, too.
  void check_one_row(Candidate* c) const {
    const Operator& op = c->product->op();
    Geometry one = c->geometry;
    one.n = 1;
    one.y[one.y.size() - 2] = 1;
    if (c->product->estimate(one, threads_) * margin + partition_seconds >= estimate_dense(op, one, threads_)) {
      c->dense = std::min(c->dense, c->own);
      c->reason = "one row alone would not win";
    }
  }

  // A PAD that XNNPACK makes part of the windows that read it.
  bool folded(int p) const {
    const auto& readers = g_.readers[size_t(g_.output(p, 0))];
    return g_.code(p) == kPad && std::all_of(readers.begin(), readers.end(), [&](int r) { return g_.code(r) == kConv2d || g_.code(r) == kDepthwiseConv2d; });
  }

  // -- islands --------------------------------------------------------------------------------------------------------

  bool sparse_image(const Candidate& c) const {
    return c.product && c.product->op().form == Operator::Form::image && c.product->op().conv.type == PARING_F32;
  }

  std::vector<int> possible_members() {
    std::vector<int> members;
    for (int p = 0; p < g_.size(); p++)
      if (at(p).verdict == Verdict::taken && !at(p).guessed && (!at(p).product || sparse_image(at(p)))) members.push_back(p);
    return members;
  }

  // Connected members that can run without anything else in between.
  std::vector<std::vector<int>> parts(const std::vector<int>& members) {
    std::vector<bool> marked(size_t(g_.size()));
    for (int p : members) marked[size_t(p)] = true;
    return parts(members, g_.turns(marked));
  }
  std::vector<std::vector<int>> parts(const std::vector<int>& members, const std::vector<int>& turns) {
    std::map<int, std::vector<int>> by_turn;
    for (int p : members) by_turn[turns[size_t(p)]].push_back(p);
    std::vector<std::vector<int>> all;
    for (const auto& turn : by_turn)
      for (auto& part : connected(g_, turn.second)) all.push_back(std::move(part));
    return all;
  }

  // Values that come from outside, and those that somebody outside reads (or nobody, as the model's results).
  void borders(const std::vector<int>& members, std::vector<int>* in, std::vector<int>* out) {
    auto inside = [&](int p) { return std::binary_search(members.begin(), members.end(), p); };
    in->clear(), out->clear();
    for (int p : members) {
      const Operator& op = at(p).what();
      for (int t : {op.x, op.x2})
        if (t >= 0 && (g_.producer[size_t(t)] < 0 || !inside(g_.producer[size_t(t)])) && std::find(in->begin(), in->end(), t) == in->end())
          in->push_back(t);
      const auto& readers = g_.readers[size_t(op.y)];
      if (readers.empty() || !std::all_of(readers.begin(), readers.end(), inside)) out->push_back(op.y);
    }
  }

  double conversion(const std::vector<int>& members) {
    std::vector<int> in, out;
    borders(members, &in, &out);
    double bytes = 0;
    for (int t : in) bytes += 4 * double(elements_of(dims_of(g_.tensor(t))));
    for (int t : out) bytes += 4 * double(elements_of(dims_of(g_.tensor(t))));
    return bytes * conversion_seconds / std::max(1, threads_);
  }

  // Takes operators off the borders as long as layouts are converted for less without them.
  std::vector<int> trim(std::vector<int> members) {
    double now = conversion(members);
    for (bool again = true; again && members.size() > 1;) {
      again = false;
      for (size_t i = 0; i < members.size(); i++) {
        std::vector<int> rest = members;
        rest.erase(rest.begin() + std::ptrdiff_t(i));
        Candidate& c = at(members[i]);
        double then = conversion(rest);
        if (then >= now || now - then + estimate_in_planes(c.what(), c.product ? c.product->info().nonzeros : 0, c.geometry, threads_) <= c.otherwise()) continue;
        if (parts(rest).size() != 1) continue;   // something outside would stand between
        members.swap(rest);
        now = then, again = true;
        break;
      }
    }
    return members;
  }

  // Pixels of what an operator makes; a PAD goes with who reads it.
  int64_t pixels(int p, const std::vector<int>& members) const {
    if (g_.code(p) == kPad)
      for (int r : g_.readers[size_t(g_.output(p, 0))])
        if (r != p && std::binary_search(members.begin(), members.end(), r)) return pixels(r, members);
    const std::vector<int>& y = all_[size_t(p)].geometry.y;
    return int64_t(y[1]) * y[2];
  }

  // One island, or where it does not pay, what is left of it without its largest images, and these by themselves.
  void try_islands(const std::vector<int>& members) {
    if (try_island(members)) return;
    int64_t most = 0;
    for (int p : members) most = std::max(most, pixels(p, members));
    std::vector<int> large, small;
    for (int p : members) (pixels(p, members) == most ? large : small).push_back(p);
    if (small.empty()) return;
    for (const auto& part : parts(large)) try_islands(part);
    for (const auto& part : parts(small)) try_islands(part);
  }

  // More than a chain of 1x1 convolutions, whose values stay near in both ways.
  bool many(const std::vector<int>& members) const {
    return std::any_of(members.begin(), members.end(), [&](int p) {
      const Candidate& c = all_[size_t(p)];
      return !c.product || c.product->op().conv.kernel_h * c.product->op().conv.kernel_w > 1;
    });
  }

  bool try_island(std::vector<int> members) {
    auto lacks_product = [&] { return std::none_of(members.begin(), members.end(), [&](int p) { return at(p).product != nullptr; }); };
    if (lacks_product()) return false;
    members = trim(std::move(members));
    if (lacks_product()) return false;
    std::vector<int> in, out;
    borders(members, &in, &out);
    std::vector<const Operator*> ops;
    double otherwise = 0, dense = 0;
    for (int p : members) {
      ops.push_back(&at(p).what());
      otherwise += at(p).otherwise();
      dense += at(p).dense;
    }
    std::string why;
    auto give_up = [&] {
      for (int p : members) at(p).reason = why;
      return false;
    };
    auto island = Island::build(ops, out, &why);
    std::vector<std::vector<int>> x, y;
    for (int t : in) x.push_back(dims_of(g_.tensor(t)));
    if (!island || !island->prepare(x, threads_, &y, &why)) return give_up();
    double expected = island->estimate();
    why = text("in planes expected %.0f us for %zu operators, %.0f us otherwise", 1e6 * expected, members.size(), 1e6 * otherwise);
    // Several threads: the runtime's own wait for ours and ours for them at each border, and share less well in short steps.
    const double won = threads_ > 1 ? several : many(members) ? together : margin;
    if (!(expected * won + partition_seconds < otherwise)) return give_up();
    if (options_.measure) {
      double took = measure(island.get(), x, y), at_one = 0;
      for (int p : members) at_one += otherwise_in_one_thread(p);
      if (took * std::min(won, measured_margin) > at_one) {
        why = text("in planes measured %.0f us in one thread for %zu operators, %.0f us otherwise", 1e6 * took, members.size(), 1e6 * at_one);
        return give_up();
      }
      if (took > 0) why += text(" (measured %.0f us in one thread)", 1e6 * took);
    }
    said_[members.front()] = text("%s, %.1fx over dense", why.c_str(), expected > 0 ? dense / expected : 0);
    for (int p : members) {
      at(p).in_island = at(p).claimed = true;
      at(p).reason = text("in the planes of node %d", g_.nodes[size_t(members.front())].index);
    }
    claim_.islands.push_back(std::move(island));
    return true;
  }

  double measure(Island* island, const std::vector<std::vector<int>>& x, std::vector<std::vector<int>> y) {
    std::string ignored;
    if (threads_ > 1 && !island->prepare(x, 1, &y, &ignored)) return 0;
    return watch_.island(*island, x, y, island->estimate());
  }

  double otherwise_in_one_thread(int p) {
    const Candidate& c = at(p);
    if (!c.product) return folded(p) ? 0 : estimate_other(c.op, c.geometry, 1);
    return c.wins() ? c.product->estimate(c.geometry, 1) : estimate_dense(c.product->op(), c.geometry, 1);
  }

  // -- single products ------------------------------------------------------------------------------------------------

  void try_alone(int p) {
    Candidate& c = at(p);
    if (!c.product || c.claimed) return;
    std::string first = c.reason.empty() ? "" : c.reason + "; alone: ";
    c.reason = first + text("expected %.1f us, dense %.1f us", 1e6 * c.own, 1e6 * c.dense);
    if (!c.wins()) return;
    c.claimed = true;
    if (!options_.measure) return;
    double dense = estimate_dense(c.product->op(), c.geometry, 1);
    std::string ignored;
    double took = c.product->prepare(c.geometry, 1, &ignored) ? watch_.product(*c.product, c.geometry, c.product->estimate(c.geometry, 1)) : 0;
    if (took > 0) c.reason += text(", measured %.1f us in one thread", 1e6 * took);
    c.claimed = took * measured_margin <= dense;
  }

  // The runtime hands nodes over in turns; an island that would come back in two is made two, or left.
  void cut_as_the_runtime_does() {
    for (int round = 0; round < most_rounds; round++) {
      std::vector<int> turns = g_.turns(marked());
      std::vector<std::unique_ptr<Island>> whole;
      std::vector<std::vector<int>> cut;
      for (auto& island : claim_.islands) {
        const std::vector<int>& members = island->positions();
        bool one = std::all_of(members.begin(), members.end(), [&](int p) { return turns[size_t(p)] == turns[size_t(members[0])]; });
        if (one) {
          whole.push_back(std::move(island));
          continue;
        }
        for (int p : members) at(p).in_island = at(p).claimed = false, at(p).reason.clear();
        said_.erase(members.front());
        if (round + 1 < most_rounds)
          for (auto& part : parts(members, turns)) cut.push_back(part);
        else
          for (int p : members) cut.push_back({p});
      }
      claim_.islands.swap(whole);
      if (cut.empty()) return;
      for (const auto& members : cut) {
        if (members.size() > 1) try_islands(members);
        for (int p : members) try_alone(p);
      }
    }
  }

  // -- the result -----------------------------------------------------------------------------------------------------

  std::vector<bool> marked() {
    std::vector<bool> all(size_t(g_.size()));
    for (int p = 0; p < g_.size(); p++) all[size_t(p)] = at(p).claimed;
    // What unpacks constants is taken with its readers: nothing is left to do, and nothing is stored.
    std::vector<int> helpers;
    for (int p = 0; p < g_.size(); p++)
      if (at(p).claimed) helpers.insert(helpers.end(), at(p).what().helpers.begin(), at(p).what().helpers.end());
    std::sort(helpers.begin(), helpers.end(), std::greater<int>());
    helpers.erase(std::unique(helpers.begin(), helpers.end()), helpers.end());
    claim_.helpers.clear();
    for (int p : helpers) {   // later ones first: a DENSIFY goes when its DEQUANTIZE does
      const auto& readers = g_.readers[size_t(g_.output(p, 0))];
      if (!std::all_of(readers.begin(), readers.end(), [&](int r) { return all[size_t(r)]; })) continue;
      all[size_t(p)] = true;
      claim_.helpers.push_back(p);
    }
    return all;
  }

  Claim finish() {
    claim_.marked = marked();
    if (options_.verbose) print();
    for (int p = 0; p < g_.size(); p++) {
      if (!at(p).claimed || at(p).in_island) continue;
      at(p).product->op().drop_constants();
      claim_.products[p] = std::move(at(p).product);
    }
    return std::move(claim_);
  }

  void print() {
    std::string all;
    int taken = 0;
    for (int p = 0; p < g_.size(); p++) {
      Candidate& c = at(p);
      taken += c.claimed;
      int code = g_.code(p);
      bool product = code == kFullyConnected || code == kConv2d || code == kBatchMatmul;
      if (!product && !c.claimed) continue;
      const Operator& op = c.what();
      all += text("paring: node %d %s '%s': ", g_.nodes[size_t(p)].index, operator_name(code), g_.name(p).c_str());
      if (c.product) {
        paring_layer_info info = c.product->info();
        all += text("%s, %.0f %% zeros, ", type_name(op), 100 * op.zeros);
        if (!c.in_island) all += text("%s, kernel %s, expected gain %.1fx, ", pattern(info).c_str(), info.kernel, c.own > 0 ? c.dense / c.own : 0);
      }
      all += text("%s: %s\n", c.claimed ? "claimed" : "not claimed", c.reason.c_str());
      if (auto island = said_.find(p); island != said_.end()) all += text("paring: the planes of node %d: %s\n", g_.nodes[size_t(p)].index, island->second.c_str());
    }
    all += text("paring: %d of %d nodes claimed, %s, %d threads\n", taken, g_.size(), paring_isa(), threads_);
    fwrite(all.data(), 1, all.size(), stderr);
  }

  const Graph& g_;
  const Options& options_;
  int threads_;
  Stopwatch watch_;
  std::vector<Candidate> all_;
  std::map<int, std::string> said_;   // of islands, by their first position
  Claim claim_;
};

}  // namespace

std::vector<std::vector<int>> connected(const Graph& g, const std::vector<int>& members) {
  std::vector<size_t> root(members.size());
  std::iota(root.begin(), root.end(), size_t(0));
  auto find = [&](size_t i) {
    while (root[i] != i) i = root[i] = root[root[i]];
    return i;
  };
  for (size_t i = 0; i < members.size(); i++)
    for (int k = 0; k < g.inputs(members[i]); k++) {
      int t = g.input(members[i], k);
      if (t < 0 || g.producer[size_t(t)] < 0) continue;
      auto maker = std::lower_bound(members.begin(), members.end(), g.producer[size_t(t)]);
      if (maker != members.end() && *maker == g.producer[size_t(t)]) root[find(i)] = find(size_t(maker - members.begin()));
    }
  std::map<size_t, std::vector<int>> parts;
  for (size_t i = 0; i < members.size(); i++) parts[find(i)].push_back(members[i]);
  std::vector<std::vector<int>> all;
  for (auto& part : parts) all.push_back(std::move(part.second));
  return all;
}

Claim decide(const Graph& g, const Options& o, int threads) { return Decision(g, o, threads).run(); }

}  // namespace litert
}  // namespace paring
