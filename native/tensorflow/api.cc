#include "api.h"

#include <dlfcn.h>

namespace paring {
namespace tensorflow {

Api tf;

std::string find_tensorflow() {
#if defined(__APPLE__)
  const char* framework = "libtensorflow_framework.2.dylib";
#else
  const char* framework = "libtensorflow_framework.so.2";
#endif
  // A server that has TensorFlow inside offers its functions to everybody.
  void* library = dlopen(framework, RTLD_NOLOAD | RTLD_NOW);
  auto find = [&](const char* name) { return dlsym(library ? library : RTLD_DEFAULT, name); };
  if (!library && !find("TF_NewStatus")) return std::string("expected a process with TensorFlow in it, got one without ") + framework;
#define PARING_FIND(result, name, arguments) \
  if (!(tf.name = reinterpret_cast<result(*) arguments>(find("TF_" #name)))) return "expected TF_" #name " in TensorFlow's C API, got none";
  PARING_TENSORFLOW_CALLS(PARING_FIND)
#undef PARING_FIND
  return "";
}

}  // namespace tensorflow
}  // namespace paring
