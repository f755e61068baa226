// How many threads a run may use.
#pragma once
#include "api.h"

namespace paring {
namespace tensorflow {

// TensorFlow's `intra_op_parallelism_threads`, from the configuration of the session or of the eager context that this runs in.
// 0 where it cannot be asked for: TensorFlow computes a constant, in a place without a configuration.
int configured_threads(TF_OpKernelContext*);

}  // namespace tensorflow
}  // namespace paring
