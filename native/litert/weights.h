// Constant weights, whatever they hide behind: float16 or int8 behind DEQUANTIZE, a sparse encoding, DENSIFY, both.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "abi.h"
#include "graph.h"

namespace paring {
namespace litert {

// Where a constant is stored, and the operators between the storage and who reads it (positions, reader's side first).
struct Source {
  int tensor = -1;
  std::vector<int> through;
  bool dequantized = false;
};

// False where the tensor is no constant.
bool find_source(const Graph&, int tensor, Source*);

// Share of zeros in a sample of a few rows, read without unpacking anything; what is stored sparsely counts by its size.
double sample_zeros(const Graph&, const Source&);

// A dense constant, float32 or int8. `storage` is empty where the model's own bytes serve; these live as long as the
// interpreter.
struct Constant {
  TfLiteType type = kNoType;
  std::vector<int> dims;
  const void* data = nullptr;
  std::vector<char> storage;
  int64_t zeros = 0;
  bool finite = true;        // no infinity, no not-a-number (float32); no -128 (int8, which kernels do not take)
  std::vector<float> scale;  // int8: one, or one per channel of dimension `axis`
  int axis = 0;

  int64_t elements() const { return elements_of(dims); }
  const float* floats() const { return static_cast<const float*>(data); }
  const int8_t* bytes() const { return static_cast<const int8_t*>(data); }
};

// Unpacks what `find_source` found. False and a reason where its form is not known or it contradicts itself.
bool unpack(const Graph&, const Source&, Constant*, std::string* reason);

// A constant of 32-bit integers (paddings, bias) as it is; null where it is none.
const int32_t* constant_int32(const Graph&, int tensor, int64_t* elements);

}  // namespace litert
}  // namespace paring
