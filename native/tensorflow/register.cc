// What loading the library does: it registers the operators with the TensorFlow of the process.
#include <cstdio>
#include <exception>

#include "call.h"
#include "paring.h"
#include "product.h"
#include "shapes.h"

namespace paring {
namespace tensorflow {
namespace {

struct Operator {
  const char* name;          // whoever lacks the library reads it in TensorFlow's own error: it says what to do
  Form form;
  InferShape infer;
  Create create;
};

// Runs what TensorFlow has called; what it throws is given to `report` with the code for TensorFlow.
template <class F, class Report> void guarded(F run, Report report) {
  try {
    return run();
  } catch (const Failure& f) {
    report(f.code, f.message.c_str());
  } catch (const std::bad_alloc&) {
    report(resource_exhausted, "out of memory");
  } catch (const std::exception& e) {
    report(internal, e.what());
  }
}

template <Form form> void* create(TF_OpKernelConstruction* c) {
  void* made = nullptr;
  guarded([&] { made = new Product(c, form); }, [&](int code, const char* message) {
    Status status;
    tf.SetStatus(status, code, message);
    tf.OpKernelConstruction_Failure(c, status);
  });
  return made;
}

void compute(void* kernel, TF_OpKernelContext* c) {
  guarded([&] { static_cast<Product*>(kernel)->run(c); }, [&](int code, const char* message) {
    Status status;
    tf.SetStatus(status, code, message);
    tf.OpKernelContext_Failure(c, status);
  });
}

void destroy(void* kernel) { delete static_cast<Product*>(kernel); }

void add(const Operator& o) {
  bool packed = o.form == Form::packed_matmul || o.form == Form::packed_conv, conv = o.form == Form::conv || o.form == Form::packed_conv;
  TF_OpDefinitionBuilder* op = tf.NewOpDefinitionBuilder(o.name);
  tf.OpDefinitionBuilderAddInput(op, "x: T");
  tf.OpDefinitionBuilderAddInput(op, packed ? "packed: int8" : "weights: int8");
  tf.OpDefinitionBuilderAddInput(op, "scale: float");
  tf.OpDefinitionBuilderAddOutput(op, "product: T");
  tf.OpDefinitionBuilderAddAttr(op, "T: {float, bfloat16}");
  tf.OpDefinitionBuilderAddAttr(op, "round_to_bfloat16: bool = false");
  if (o.form == Form::matmul) tf.OpDefinitionBuilderAddAttr(op, "transpose_weights: bool = false");
  if (packed) tf.OpDefinitionBuilderAddAttr(op, "dynamic: bool = false");
  if (conv) {
    tf.OpDefinitionBuilderAddAttr(op, "strides: list(int)");
    tf.OpDefinitionBuilderAddAttr(op, "dilations: list(int) = [1, 1, 1, 1]");
    tf.OpDefinitionBuilderAddAttr(op, "padding: {'SAME', 'VALID', 'EXPLICIT'}");
    tf.OpDefinitionBuilderAddAttr(op, "explicit_paddings: list(int) = []");
  }
  tf.OpDefinitionBuilderSetShapeInferenceFunction(op, o.infer);
  Status status;
  tf.RegisterOpDefinition(op, status);
  status.check();
  tf.RegisterKernelBuilder(o.name, tf.NewKernelBuilder(o.name, "CPU", o.create, compute, destroy), status);
  status.check();
}

// Why there are no operators; empty where there are.
std::string& failure() {
  static std::string* const text = new std::string;
  return *text;
}

__attribute__((constructor)) void register_all() {
  guarded([] {
    std::string missing = find_tensorflow();
    if (!missing.empty()) throw Failure{unimplemented, missing};
    for (const Operator& o : {
             Operator{"ImportParingTensorflow>MatMul", Form::matmul, infer_matmul, create<Form::matmul>},
             Operator{"ImportParingTensorflow>Conv2D", Form::conv, infer_conv, create<Form::conv>},
             Operator{"ImportParingTensorflow>PackedMatMul", Form::packed_matmul, infer_packed_matmul, create<Form::packed_matmul>},
             Operator{"ImportParingTensorflow>PackedConv2D", Form::packed_conv, infer_conv, create<Form::packed_conv>},
         })
      add(o);
  }, [](int, const char* message) {
    failure() = message;
    std::fprintf(stderr, "paring: cannot register its TensorFlow operators: %s.\n", message);
  });
}

}  // namespace
}  // namespace tensorflow
}  // namespace paring

// Why loading has registered nothing, or the empty string: `tf.load_op_library` cannot tell.
extern "C" PARING_API const char* paring_tensorflow_failure(void) { return paring::tensorflow::failure().c_str(); }
