// A layer with packed weights, and a plan: the layer bound to an input shape. Behind the C API of paring.h.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "paring.h"

namespace paring {

// 64-byte aligned memory; large pieces on huge pages where the system gives them.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes);
  Memory(Memory&& other) noexcept : at_(other.at_), bytes_(other.bytes_) { other.at_ = nullptr; other.bytes_ = 0; }
  Memory& operator=(Memory&& other) noexcept { std::swap(at_, other.at_); std::swap(bytes_, other.bytes_); return *this; }
  ~Memory();
  char* get() const { return at_; }
  size_t bytes() const { return bytes_; }

 private:
  char* at_ = nullptr;
  size_t bytes_ = 0;
};

// How many blocks of R outputs x I inputs (of one tap) hold a weight that is not zero.
int64_t count_blocks(const paring_conv&, int outputs, int inputs);
inline size_t element_bytes(const paring_conv& c) { return c.type == PARING_F32 ? 4 : 1; }

}  // namespace paring

struct paring_layer {
  paring_conv conv;                  // without weights and bias: those are packed
  const paring::Kernel* kernel = nullptr;
  paring_layer_info info = {};
  paring::Packed packed = {};
  int pass_inputs = 0;               // input channels of a pass
  struct Place { uint16_t tap; uint16_t input; };   // input: counted in blocks
  std::vector<Place> places;         // of each block
  std::vector<uint32_t> start;
  std::vector<uint16_t> entry16;     // where the geometry does not matter (1x1): ready for use
  std::vector<int32_t> entry32;
  std::vector<float> scale;
  std::vector<int32_t> bias, sum;
  paring::Memory value;
};
