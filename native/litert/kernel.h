// One partition of claimed nodes, as the runtime runs it: its steps in order, and the values between them.
#pragma once
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "claim.h"

namespace paring {
namespace litert {

class Kernel {
 public:
  // Takes what the partition needs out of the claim. Never fails: what went wrong is said by `prepare`.
  Kernel(Claim*, Graph*, const TfLiteDelegateParams&, int threads);

  // Shapes of all values from those of the inputs; working memory; the outputs are resized.
  TfLiteStatus prepare(TfLiteContext*, TfLiteNode*);
  TfLiteStatus invoke(TfLiteContext*, TfLiteNode*);

 private:
  struct Step {
    std::unique_ptr<Product> product;   // one of the two
    std::unique_ptr<Island> island;
    std::string name;
    std::vector<int> inputs, outputs;   // tensors
    std::vector<std::vector<int>> bound;   // shapes of the inputs that it is prepared for
    std::vector<const void*> in;        // of a run
    std::vector<void*> out;
  };
  // A value that a step reads or makes.
  struct Value {
    std::vector<int> dims;
    size_t element = 4;          // bytes
    bool inside = false;         // only steps of this partition see it: it lies in `memory_`
    int first = 0, last = 0;     // steps: its maker and its last reader
    size_t offset = 0;
    size_t bytes() const { return size_t(elements_of(dims)) * element; }
  };
  struct Free { void operator()(void* p) const { std::free(p); } };

  bool take(Claim*, Graph*, const TfLiteDelegateParams&);
  bool take_broken(const Graph&, const std::vector<int>& positions, const std::vector<int>& leaves);
  void add(const Graph&, std::unique_ptr<Product>, std::unique_ptr<Island>);
  bool order();
  bool bind(Step&, std::string* reason);
  bool place();
  TfLiteStatus fail(TfLiteContext*, const std::string& where, const std::string& why) const;

  int threads_;
  std::string failure_;
  std::vector<Step> steps_;
  std::map<int, Value> values_;        // by tensor
  std::vector<int> unused_;            // outputs that only claimed readers see: constants they have packed
  std::vector<std::pair<int, std::vector<char>>> constants_;   // outputs that are constants, unpacked
  std::unique_ptr<char, Free> memory_;
  size_t memory_bytes_ = 0;
};

}  // namespace litert
}  // namespace paring
