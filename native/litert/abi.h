// What an external delegate shares with the LiteRT runtime: C structures, declared from their published layout, so that
// one library serves every wheel and links none. Every call into the runtime goes through a pointer in TfLiteContext.
// Seen right on x86-64 Linux with the versions of `checked_versions`; layout.h looks, at run time, whether they still are.
#pragma once
#include <cstddef>
#include <cstdint>

namespace paring {
namespace litert {

constexpr const char* checked_versions = "ai-edge-litert 2.3.0, tensorflow 2.21.0";

extern "C" {

enum TfLiteStatus : int32_t { kOk = 0, kError = 1 };

enum TfLiteType : int32_t {
  kNoType = 0, kFloat32 = 1, kInt32 = 2, kUInt8 = 3, kInt64 = 4, kString = 5, kBool = 6, kInt16 = 7, kComplex64 = 8, kInt8 = 9,
  kFloat16 = 10, kFloat64 = 11, kComplex128 = 12, kUInt64 = 13, kResource = 14, kVariant = 15, kUInt32 = 16, kUInt16 = 17,
};

enum TfLiteAllocation : int32_t { kNoMemory = 0, kMappedConstant = 1, kArena = 2, kArenaPersistent = 3, kDynamic = 4, kPersistentConstant = 5 };

enum TfLiteActivation : int32_t { kNoActivation = 0, kRelu = 1, kReluN1To1 = 2, kRelu6 = 3 };

enum TfLitePadding : int32_t { kSame = 1, kValid = 2 };

// Numbers of the schema's BuiltinOperator.
enum TfLiteOperator : int32_t {
  kAdd = 0, kConv2d = 3, kDepthwiseConv2d = 4, kDequantize = 6, kFullyConnected = 9, kPad = 34, kDelegateOperator = 51, kDensify = 124, kBatchMatmul = 126,
};

// Arrays carry their length in front. Whoever makes one for the runtime takes it from malloc.
struct TfLiteIntArray { int32_t size; int32_t data[]; };
struct TfLiteFloatArray { int32_t size; float data[]; };

struct TfLiteContext;
struct TfLiteDelegate;

// quantization.params where quantization.type == 1.
struct TfLiteAffine { TfLiteFloatArray* scale; TfLiteIntArray* zero_point; int32_t axis; };

// One level of a sparse encoding: dense (format 0), or compressed rows (format 1).
struct TfLiteLevel { int32_t format; int32_t dense_size; TfLiteIntArray* segments; TfLiteIntArray* indices; };
struct TfLiteSparsity { TfLiteIntArray* traversal_order; TfLiteIntArray* block_map; TfLiteLevel* levels; int32_t level_count; };

struct TfLiteTensor {
  TfLiteType type;
  void* data;
  TfLiteIntArray* dims;
  struct { float scale; int32_t zero_point; } params;   // of one grid per tensor; {0, 0} where there are several
  TfLiteAllocation allocation_type;
  size_t bytes;
  const void* allocation;
  const char* name;
  TfLiteDelegate* delegate;
  int32_t buffer_handle;
  bool data_is_stale, is_variable;
  struct { int32_t type; void* params; } quantization;
  TfLiteSparsity* sparsity;
  const TfLiteIntArray* dims_signature;
};

struct TfLiteNode {
  TfLiteIntArray *inputs, *outputs, *intermediates, *temporaries;
  void* user_data;       // what `init` gave
  void* builtin_data;    // the operator's options
  // Further fields are not needed; nodes come as pointers only.
};

struct TfLiteRegistration {
  void* (*init)(TfLiteContext*, const char* buffer, size_t length);
  void (*free)(TfLiteContext*, void* user_data);
  TfLiteStatus (*prepare)(TfLiteContext*, TfLiteNode*);
  TfLiteStatus (*invoke)(TfLiteContext*, TfLiteNode*);
  const char* (*profiling_string)(const TfLiteContext*, const TfLiteNode*);
  int32_t builtin_code;
  const char* custom_name;
  int32_t version;
  void* registration_external;
  void* async_kernel;
  uint64_t inplace_operator;
};

struct TfLiteContext {
  size_t tensors_size;
  TfLiteStatus (*GetExecutionPlan)(TfLiteContext*, TfLiteIntArray** plan);
  TfLiteTensor* tensors;
  void* implementation;
  TfLiteStatus (*ResizeTensor)(TfLiteContext*, TfLiteTensor*, TfLiteIntArray* new_dims);   // takes new_dims over
  void (*ReportError)(TfLiteContext*, const char* format, ...);
  TfLiteStatus (*AddTensors)(TfLiteContext*, int count, int* first);
  TfLiteStatus (*GetNodeAndRegistration)(TfLiteContext*, int node, TfLiteNode**, TfLiteRegistration**);
  TfLiteStatus (*ReplaceNodeSubsetsWithDelegateKernels)(TfLiteContext*, TfLiteRegistration, const TfLiteIntArray* nodes, TfLiteDelegate*);
  int32_t recommended_num_threads;
  // Further fields are not needed.
};

// Without it a model that has dynamic tensors could not be built with the delegate at all, and every resizing of an
// input would undo the claims and make them again.
constexpr int64_t kAllowDynamicTensors = 1;

struct TfLiteDelegate {
  void* data;
  TfLiteStatus (*Prepare)(TfLiteContext*, TfLiteDelegate*);
  void* (*buffer_functions[3])();   // copies between devices: none here
  int64_t flags;
  void* opaque_delegate_builder;
};

// What `init` of a delegate's kernel gets as its buffer.
struct TfLiteDelegateParams { TfLiteDelegate* delegate; TfLiteIntArray *nodes_to_replace, *input_tensors, *output_tensors; };

struct TfLiteConvParams { int32_t padding, stride_w, stride_h, activation, dilation_w, dilation_h, bias_type; };
struct TfLiteDepthwiseParams { int32_t padding, stride_w, stride_h, multiplier, activation, dilation_w, dilation_h; };
struct TfLiteFullyConnectedParams { int32_t activation, weights_format; bool keep_num_dims, asymmetric; int32_t bias_type; };
struct TfLiteBatchMatmulParams { bool adj_x, adj_y, asymmetric; };
struct TfLiteAddParams { int32_t activation; bool pot_scale; };

}  // extern "C"

static_assert(sizeof(void*) == 8, "LiteRT's layout is known for 64-bit machines only");
static_assert(offsetof(TfLiteTensor, dims) == 16 && offsetof(TfLiteTensor, allocation_type) == 32 && offsetof(TfLiteTensor, bytes) == 40, "tensor");
static_assert(offsetof(TfLiteTensor, quantization) == 80 && offsetof(TfLiteTensor, sparsity) == 96 && sizeof(TfLiteTensor) == 112, "tensor");
static_assert(offsetof(TfLiteRegistration, builtin_code) == 40 && sizeof(TfLiteRegistration) == 88, "registration");
static_assert(offsetof(TfLiteContext, recommended_num_threads) == 72, "context");
static_assert(offsetof(TfLiteDelegate, flags) == 40 && sizeof(TfLiteDelegate) == 56, "delegate");

}  // namespace litert
}  // namespace paring
