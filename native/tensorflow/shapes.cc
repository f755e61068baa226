#include "shapes.h"

#include <algorithm>
#include <utility>

#include "call.h"

namespace paring {
namespace tensorflow {
namespace {

constexpr int64_t unknown = -1;

// A shape of one inference.
class Partial {
 public:
  explicit Partial(TF_ShapeInferenceContext* context) : context_(context), at_(tf.NewShapeHandle()) {}
  Partial(TF_ShapeInferenceContext* context, int64_t size) : context_(context), at_(tf.ShapeInferenceContextVectorFromSize(context, size_t(size))) {}
  Partial(Partial&& other) noexcept : context_(other.context_), at_(other.at_) { other.at_ = nullptr; }
  Partial& operator=(Partial&& other) noexcept { std::swap(at_, other.at_); return *this; }
  ~Partial() { if (at_) tf.DeleteShapeHandle(at_); }

  static Partial input(TF_ShapeInferenceContext* context, int index) {
    Partial p(context);
    Status status;
    tf.ShapeInferenceContextGetInput(context, index, p.at_, status);
    status.check();
    return p;
  }
  // -1 where it is not known.
  int64_t rank() const { return tf.ShapeInferenceContextRankKnown(context_, at_) ? tf.ShapeInferenceContextRank(context_, at_) : unknown; }
  int64_t dim(int64_t i) const {
    TF_DimensionHandle* d = tf.NewDimensionHandle();
    tf.ShapeInferenceContextDim(context_, at_, i, d);
    int64_t value = tf.DimensionHandleValueKnown(d) ? tf.DimensionHandleValue(d) : unknown;
    tf.DeleteDimensionHandle(d);
    return value;
  }
  Partial part(int64_t first, int64_t last) const {
    Partial p(context_);
    Status status;
    tf.ShapeInferenceContextSubshape(context_, at_, first, last, p.at_, status);
    status.check();
    return p;
  }
  Partial then(const Partial& next) const {
    Partial p(context_);
    Status status;
    tf.ShapeInferenceContextConcatenateShapes(context_, at_, next.at_, p.at_, status);
    status.check();
    return p;
  }
  void give() const {
    Status status;
    tf.ShapeInferenceContextSetOutput(context_, 0, at_, status);
    status.check();
  }

 private:
  TF_ShapeInferenceContext* context_;
  TF_ShapeHandle* at_;
};

void give_unknown(TF_ShapeInferenceContext* c) {
  Status status;
  tf.ShapeInferenceContextSetUnknownShape(c, status);
  status.check();
}

// [outputs], as a shape of one dimension.
Partial outputs(TF_ShapeInferenceContext* c) {
  Partial scale = Partial::input(c, 2);
  int64_t rank = scale.rank();
  if (rank == 0) fail(invalid_argument, "expected a scale of each output, got a scalar");
  return rank < 1 ? Partial(c, unknown) : scale.part(rank - 1, rank);
}

int64_t both(int64_t a, int64_t b) {
  if (a == unknown || b == unknown) return std::max(a, b) > 1 ? std::max(a, b) : unknown;
  if (a != b && a != 1 && b != 1) fail(invalid_argument, "expected batches that broadcast, got %lld and %lld", static_cast<long long>(a), static_cast<long long>(b));
  return a == 1 ? b : a;
}

void matmul(TF_ShapeInferenceContext* c, bool batches) {
  Partial x = Partial::input(c, 0), weights = Partial::input(c, 1), last = outputs(c);
  int64_t rank = x.rank(), other = batches ? weights.rank() : 2;
  int64_t least = batches ? 2 : 1;
  if (batches && other != unknown && other < least) fail(invalid_argument, "expected weights of rank 2 or more, got rank %d", int(other));
  if (!batches && weights.rank() != unknown && weights.rank() != 1) fail(invalid_argument, "expected packed weights of rank 1, got rank %d", int(weights.rank()));
  if (rank != unknown && rank < (other == 2 ? 1 : least)) fail(invalid_argument, "expected x of rank %d or more, got rank %d", other == 2 ? 1 : 2, int(rank));
  if (rank == unknown || other == unknown) return give_unknown(c);
  if (other == 2) return x.part(0, rank - 1).then(last).give();
  int64_t most = std::max(rank, other);
  Partial shape = most == rank && most > other ? x.part(0, rank - other) : weights.part(0, other - std::min(rank, other));
  for (int64_t i = std::min(rank, other); i > 2; i--) shape = shape.then(Partial(c, both(x.dim(rank - i), weights.dim(other - i))));
  shape.then(x.part(rank - 2, rank - 1)).then(last).give();
}

// Runs the inference; what it throws becomes the status.
void guarded(TF_ShapeInferenceContext* c, TF_Status* status, void (*infer)(TF_ShapeInferenceContext*)) {
  try {
    infer(c);
    tf.SetStatus(status, ok, "");
  } catch (const Failure& f) {
    tf.SetStatus(status, f.code, f.message.c_str());
  } catch (const std::bad_alloc&) {
    tf.SetStatus(status, resource_exhausted, "out of memory");
  }
}

}  // namespace

void infer_matmul(TF_ShapeInferenceContext* c, TF_Status* status) {
  guarded(c, status, [](TF_ShapeInferenceContext* c) { matmul(c, true); });
}

void infer_packed_matmul(TF_ShapeInferenceContext* c, TF_Status* status) {
  guarded(c, status, [](TF_ShapeInferenceContext* c) { matmul(c, false); });
}

void infer_conv(TF_ShapeInferenceContext* c, TF_Status* status) {
  guarded(c, status, [](TF_ShapeInferenceContext* c) {
    Partial x = Partial::input(c, 0), last = outputs(c);
    int64_t rank = x.rank();
    if (rank != unknown && rank != 4) fail(invalid_argument, "expected x of rank 4, got rank %d", int(rank));
    Partial images = rank == unknown ? Partial(c, unknown) : x.part(0, 1);
    images.then(Partial(c, unknown)).then(Partial(c, unknown)).then(last).give();
  });
}

}  // namespace tensorflow
}  // namespace paring
