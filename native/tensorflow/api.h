// TensorFlow's C API, as far as the operators need it: declared here, looked up in the process that has loaded TensorFlow. So
// one library serves every version, and needs no header of any. Seen right with TensorFlow 2.16.2 and 2.21.0.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace paring {
namespace tensorflow {

struct TF_Status;
struct TF_Tensor;
struct TF_OpKernelContext;
struct TF_OpKernelConstruction;
struct TF_KernelBuilder;
struct TF_OpDefinitionBuilder;
struct TF_ShapeInferenceContext;
struct TF_ShapeHandle;
struct TF_DimensionHandle;
struct TF_Buffer { const void* data; size_t length; void (*release)(void*, size_t); };

enum Code : int { ok = 0, invalid_argument = 3, resource_exhausted = 8, unimplemented = 12, internal = 13 };
enum Type : int { float32 = 1, int8 = 6, bfloat16 = 14 };

using Create = void* (*)(TF_OpKernelConstruction*);
using Compute = void (*)(void*, TF_OpKernelContext*);
using Destroy = void (*)(void*);
using InferShape = void (*)(TF_ShapeInferenceContext*, TF_Status*);

// result, name without its TF_, arguments
#define PARING_TENSORFLOW_CALLS(call)                                                                                    \
  call(TF_Status*, NewStatus, ())                                                                                        \
  call(void, DeleteStatus, (TF_Status*))                                                                                 \
  call(void, SetStatus, (TF_Status*, int code, const char* message))                                                     \
  call(int, GetCode, (const TF_Status*))                                                                                 \
  call(const char*, Message, (const TF_Status*))                                                                         \
  call(TF_Buffer*, NewBuffer, ())                                                                                        \
  call(void, DeleteBuffer, (TF_Buffer*))                                                                                 \
  call(void, DeleteTensor, (TF_Tensor*))                                                                                 \
  call(TF_Tensor*, TensorMaybeMove, (TF_Tensor*))                                                                        \
  call(int, TensorType, (const TF_Tensor*))                                                                              \
  call(int, NumDims, (const TF_Tensor*))                                                                                 \
  call(int64_t, Dim, (const TF_Tensor*, int))                                                                            \
  call(void*, TensorData, (const TF_Tensor*))                                                                            \
  call(void, GetInput, (TF_OpKernelContext*, int, TF_Tensor**, TF_Status*))                                              \
  call(TF_Tensor*, AllocateOutput, (TF_OpKernelContext*, int, int type, const int64_t*, int rank, size_t bytes, TF_Status*)) \
  call(int64_t, StepId, (TF_OpKernelContext*))                                                                           \
  call(void, GetSerializedConfigProto, (TF_OpKernelContext*, TF_Buffer*, TF_Status*))                                    \
  call(void, OpKernelContext_Failure, (TF_OpKernelContext*, TF_Status*))                                                 \
  call(void, OpKernelConstruction_Failure, (TF_OpKernelConstruction*, TF_Status*))                                       \
  call(void, OpKernelConstruction_GetAttrSize, (TF_OpKernelConstruction*, const char*, int32_t* list, int32_t* total, TF_Status*)) \
  call(void, OpKernelConstruction_GetAttrType, (TF_OpKernelConstruction*, const char*, int*, TF_Status*))                \
  call(void, OpKernelConstruction_GetAttrBool, (TF_OpKernelConstruction*, const char*, unsigned char*, TF_Status*))      \
  call(void, OpKernelConstruction_GetAttrString, (TF_OpKernelConstruction*, const char*, char*, size_t, TF_Status*))     \
  call(void, OpKernelConstruction_GetAttrInt64List, (TF_OpKernelConstruction*, const char*, int64_t*, int, TF_Status*))  \
  call(TF_KernelBuilder*, NewKernelBuilder, (const char* op, const char* device, Create, Compute, Destroy))              \
  call(void, RegisterKernelBuilder, (const char*, TF_KernelBuilder*, TF_Status*))                                        \
  call(TF_OpDefinitionBuilder*, NewOpDefinitionBuilder, (const char*))                                                   \
  call(void, OpDefinitionBuilderAddAttr, (TF_OpDefinitionBuilder*, const char*))                                         \
  call(void, OpDefinitionBuilderAddInput, (TF_OpDefinitionBuilder*, const char*))                                        \
  call(void, OpDefinitionBuilderAddOutput, (TF_OpDefinitionBuilder*, const char*))                                       \
  call(void, OpDefinitionBuilderSetShapeInferenceFunction, (TF_OpDefinitionBuilder*, InferShape))                        \
  call(void, RegisterOpDefinition, (TF_OpDefinitionBuilder*, TF_Status*))                                                \
  call(TF_ShapeHandle*, NewShapeHandle, ())                                                                              \
  call(void, DeleteShapeHandle, (TF_ShapeHandle*))                                                                       \
  call(TF_DimensionHandle*, NewDimensionHandle, ())                                                                      \
  call(void, DeleteDimensionHandle, (TF_DimensionHandle*))                                                               \
  call(void, ShapeInferenceContextGetInput, (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*))               \
  call(void, ShapeInferenceContextSetOutput, (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*))              \
  call(void, ShapeInferenceContextSetUnknownShape, (TF_ShapeInferenceContext*, TF_Status*))                              \
  call(int64_t, ShapeInferenceContextRank, (TF_ShapeInferenceContext*, TF_ShapeHandle*))                                 \
  call(int, ShapeInferenceContextRankKnown, (TF_ShapeInferenceContext*, TF_ShapeHandle*))                                \
  call(void, ShapeInferenceContextDim, (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, TF_DimensionHandle*))       \
  call(int, DimensionHandleValueKnown, (TF_DimensionHandle*))                                                            \
  call(int64_t, DimensionHandleValue, (TF_DimensionHandle*))                                                             \
  call(void, ShapeInferenceContextSubshape, (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, int64_t, TF_ShapeHandle*, TF_Status*)) \
  call(TF_ShapeHandle*, ShapeInferenceContextVectorFromSize, (TF_ShapeInferenceContext*, size_t))                        \
  call(void, ShapeInferenceContextConcatenateShapes, (TF_ShapeInferenceContext*, TF_ShapeHandle*, TF_ShapeHandle*, TF_ShapeHandle*, TF_Status*))

struct Api {
#define PARING_MEMBER(result, name, arguments) result(*name) arguments;
  PARING_TENSORFLOW_CALLS(PARING_MEMBER)
#undef PARING_MEMBER
};

// Set by `find_tensorflow`, before anything is registered.
extern Api tf;

// Looks the functions up -> empty, or what is missing.
std::string find_tensorflow();

}  // namespace tensorflow
}  // namespace paring
