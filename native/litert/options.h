// What the user of the delegate may set, as strings.
#pragma once
#include <cstddef>
#include <string>

namespace paring {
namespace litert {

struct Options {
  double threshold = 0.6;   // sparsity_threshold: share of zeros below which a layer is not considered
  std::string isa;          // isa: the instruction set to use, where not the best
  bool verbose = false;     // verbose: prints what becomes of each node to stderr
  int threads = 0;          // num_threads; 0: as many as the interpreter recommends
  bool measure = true;      // measure: checks what the cost model says by running it
};

// False and a message that names the option and says what may stand there.
bool read_options(const char* const* keys, const char* const* values, size_t count, Options*, std::string* message);

}  // namespace litert
}  // namespace paring
