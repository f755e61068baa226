// Whether the runtime's structures lie where abi.h says.
#pragma once
#include <string>

#include "abi.h"

namespace paring {
namespace litert {

struct Layout {
  std::string unexpected;   // what is not as declared; empty where all is
  bool can_report = false;  // the context's ReportError may be called all the same
};

// Looks at the context, at every node of the plan and at every tensor; reads no address that cannot be read.
Layout check_layout(TfLiteContext*);

}  // namespace litert
}  // namespace paring
