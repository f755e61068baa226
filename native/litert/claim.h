// Which nodes are taken from the runtime, and in what form they will run.
#pragma once
#include <map>
#include <memory>
#include <vector>

#include "graph.h"
#include "island.h"
#include "options.h"
#include "product.h"

namespace paring {
namespace litert {

// What the delegate's Prepare has decided on; its kernels take their parts out of it.
struct Claim {
  std::map<int, std::unique_ptr<Product>> products;   // by position
  std::vector<std::unique_ptr<Island>> islands;
  std::vector<int> helpers;                           // positions
  std::vector<bool> marked;                           // by position: all that is taken
};

// Takes what is expected to win, checks it by running it where the options say so, and prints why where they say that.
Claim decide(const Graph&, const Options&, int threads);

// The parts into which `members` fall when values pass between them directly; positions in order.
std::vector<std::vector<int>> connected(const Graph&, const std::vector<int>& members);

}  // namespace litert
}  // namespace paring
