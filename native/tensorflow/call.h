// One call from TensorFlow: its tensors, with their lifetimes, and failures as exceptions that end at the border.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <new>
#include <string>
#include <vector>

#include "api.h"

namespace paring {
namespace tensorflow {

struct Failure {
  int code;
  std::string message;
};

// Throws a Failure; the message as printf makes it: `expected <X>, got <Y>`.
[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail(int code, const char* format, ...) {
  char message[1000];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw Failure{code, message};
}

class Status {
 public:
  Status() : at_(tf.NewStatus()) {}
  ~Status() { tf.DeleteStatus(at_); }
  Status(const Status&) = delete;
  Status& operator=(const Status&) = delete;
  operator TF_Status*() const { return at_; }
  // Throws where the last call did not go well.
  void check() const {
    if (tf.GetCode(at_) != ok) throw Failure{tf.GetCode(at_), tf.Message(at_)};
  }

 private:
  TF_Status* at_;
};

// A reference to a tensor; its numbers are kept as long as it lives.
class Tensor {
 public:
  explicit Tensor(TF_Tensor* at = nullptr) : at_(at) {}
  Tensor(Tensor&& other) noexcept : at_(other.at_) { other.at_ = nullptr; }
  Tensor& operator=(Tensor&& other) noexcept { std::swap(at_, other.at_); return *this; }
  ~Tensor() { if (at_) tf.DeleteTensor(at_); }

  int type() const { return tf.TensorType(at_); }
  void* data() const { return tf.TensorData(at_); }
  std::vector<int64_t> shape() const {
    std::vector<int64_t> dims(size_t(tf.NumDims(at_)));
    for (size_t i = 0; i < dims.size(); i++) dims[i] = tf.Dim(at_, int(i));
    return dims;
  }
  // Whether nobody else has a reference.
  bool alone() {
    TF_Tensor* moved = tf.TensorMaybeMove(at_);
    if (moved) at_ = moved;
    return moved != nullptr;
  }

 private:
  TF_Tensor* at_;
};

using Shape = std::vector<int64_t>;

// Elements of a shape; fails where no tensor can have as many.
inline int64_t elements(const Shape& shape) {
  int64_t n = 1;
  bool none = false;
  for (int64_t d : shape) none = none || d == 0;
  if (none) return 0;
  for (int64_t d : shape)
    if (__builtin_mul_overflow(n, d, &n) || n > (int64_t(1) << 60)) fail(resource_exhausted, "expected a result that fits into memory, got one of 2^60 elements or more");
  return n;
}

inline std::string text(const Shape& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

inline Tensor input(TF_OpKernelContext* context, int index) {
  TF_Tensor* at = nullptr;
  Status status;
  tf.GetInput(context, index, &at, status);
  status.check();
  return Tensor(at);
}

// The one output, uninitialized.
inline Tensor output(TF_OpKernelContext* context, int type, const Shape& shape) {
  Status status;
  size_t bytes = size_t(elements(shape)) * (type == float32 ? 4 : 2);
  // TensorFlow ends the process where the sizes of an empty tensor overflow.
  Shape sizes = shape;
  for (int64_t& d : sizes) d = d ? d : 1;
  elements(sizes);
  Tensor made(tf.AllocateOutput(context, 0, type, shape.data(), int(shape.size()), bytes, status));
  status.check();
  return made;
}

}  // namespace tensorflow
}  // namespace paring
