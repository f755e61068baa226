#include "packed.h"

#include <cstring>

#include "call.h"

namespace paring {
namespace tensorflow {
namespace {

constexpr char magic[8] = {'P', 'A', 'R', 'I', 'N', 'G', 0, 1};
constexpr int64_t header_bytes = 64, line = 64;

struct Header {
  char magic[8];
  int32_t kind, kernel_h, kernel_w, inputs, outputs, block;
  int64_t nonzeros;
};

[[noreturn]] void broken(const char* expected, int64_t got) {
  fail(invalid_argument, "packed: expected %s, got %lld. The model's file is damaged, or of another version of paring.", expected, static_cast<long long>(got));
}

// a * b, or a size that nothing has.
int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? int64_t(1) << 62 : product;
}
int64_t up(int64_t a, int64_t unit) { return a / unit + (a % unit != 0); }

// Calls take(output, index within it, position in `values`) for every weight there is.
template <class F> void for_weights(const Blob& b, F take) {
  int64_t row = up(b.depth, 8), at = 0;
  for (int64_t o = 0; o < b.outputs; o++)
    for (int64_t i = 0; i < row; i++)
      for (unsigned bits = b.first[o * row + i]; bits; bits &= bits - 1) {
        int64_t k = i * 8 + __builtin_ctz(bits);
        if (k >= b.depth || at >= b.nonzeros) broken("as many weights in its bitmap as in its header", at);
        take(o, k, at++);
      }
  if (at != b.nonzeros) broken("as many weights in its bitmap as in its header", at);
}

}  // namespace

Blob read_blob(const void* data, int64_t bytes) {
  Header h;
  if (bytes < header_bytes) broken("a header of 64 bytes", bytes);
  std::memcpy(&h, data, sizeof h);
  if (std::memcmp(h.magic, magic, sizeof magic) != 0) broken("weights that paring has packed, version 1", h.magic[7]);
  if (h.kind < Blob::int4 || h.kind > Blob::sparse_int8) broken("kind 1, 2 or 3", h.kind);
  for (int32_t size : {h.kernel_h, h.kernel_w, h.inputs, h.outputs})
    if (size < 1) broken("sizes of at least 1", size);
  bool blocks = h.kind == Blob::int4;
  if (blocks ? h.block < 1 : h.block != 0) broken(blocks ? "a block of at least 1" : "no block", h.block);
  if (blocks ? h.nonzeros != 0 : h.nonzeros < 0) broken("a count of its kind", h.nonzeros);
  int64_t depth = times(times(h.kernel_h, h.kernel_w), h.inputs);
  int64_t first = times(blocks ? up(depth, 2) : up(depth, 8), h.outputs);
  int64_t second = blocks ? times(times(up(depth, h.block), h.outputs), 2) : times(h.nonzeros, h.kind == Blob::sparse_float32 ? 4 : 1);
  if (first > bytes || second > bytes) broken("a header that fits its bytes", bytes);
  int64_t behind = up(header_bytes + first, line) * line;
  if (behind + second != bytes) broken("a header that fits its bytes", bytes);
  const uint8_t* at = static_cast<const uint8_t*>(data);
  return {Blob::Kind(h.kind), h.kernel_h, h.kernel_w, h.inputs, h.outputs, h.block, depth, h.nonzeros, at + header_bytes, at + behind};
}

std::vector<float> expand_floats(const Blob& b) {
  std::vector<float> dense(size_t(b.outputs) * size_t(b.depth));
  for_weights(b, [&](int64_t o, int64_t k, int64_t at) {
    float& value = dense[size_t(o * b.depth + k)];
    if (b.kind == Blob::sparse_float32) std::memcpy(&value, b.second + 4 * at, 4);
    else value = float(int8_t(b.second[at]));
  });
  return dense;
}

std::vector<int8_t> expand_int8(const Blob& b) {
  std::vector<int8_t> dense(size_t(b.outputs) * size_t(b.depth));
  for_weights(b, [&](int64_t o, int64_t k, int64_t at) { dense[size_t(o * b.depth + k)] = int8_t(b.second[at]); });
  return dense;
}

}  // namespace tensorflow
}  // namespace paring
