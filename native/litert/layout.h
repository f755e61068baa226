// Whether the runtime's structures lie where abi.h says.
#pragma once
#include <string>

#include "abi.h"

namespace paring {
namespace litert {

// Looks at the context, at every node of the plan and at their tensors; reads no address that is not mapped. Gives what is
// not as expected, or an empty string.
std::string unexpected_layout(TfLiteContext*);

}  // namespace litert
}  // namespace paring
