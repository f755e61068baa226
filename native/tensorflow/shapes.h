// Shape inference. The C API shows shapes of inputs but no attributes except types: what depends on strides or on a transposed
// weight is unknown until it runs. The last dimension is that of the scale.
#pragma once
#include "api.h"

namespace paring {
namespace tensorflow {

void infer_matmul(TF_ShapeInferenceContext*, TF_Status*);          // weights may have batch dimensions
void infer_packed_matmul(TF_ShapeInferenceContext*, TF_Status*);
void infer_conv(TF_ShapeInferenceContext*, TF_Status*);

}  // namespace tensorflow
}  // namespace paring
