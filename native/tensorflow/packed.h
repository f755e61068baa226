// Packed weights: one vector of bytes, as src/paring/formats/saved_model/packed.py writes and describes it. Nothing in it is
// believed before it is looked at.
#pragma once
#include <cstdint>
#include <vector>

namespace paring {
namespace tensorflow {

struct Blob {
  enum Kind : int32_t { int4 = 1, sparse_float32 = 2, sparse_int8 = 3 };

  Kind kind;
  int32_t kernel_h, kernel_w, inputs, outputs;
  int32_t block;               // int4: inputs that share a scale
  int64_t depth;               // kernel_h * kernel_w * inputs
  int64_t nonzeros;            // sparse
  const uint8_t* first;        // int4: codes; sparse: bitmap
  const uint8_t* second;       // int4: float16 scales; sparse: values

  int64_t blocks() const { return (depth + block - 1) / block; }
};

// Fails where the bytes are not such a vector.
Blob read_blob(const void* data, int64_t bytes);

// Dense weights [outputs][depth] of a sparse vector, float or int8. Fails where bitmap and header disagree.
std::vector<float> expand_floats(const Blob&);
std::vector<int8_t> expand_int8(const Blob&);

}  // namespace tensorflow
}  // namespace paring
