#include "threads.h"

#include <algorithm>
#include <cstdlib>
#include <thread>

#include "call.h"

namespace paring {
namespace tensorflow {
namespace {

constexpr uint64_t intra_op_field = 2;   // of ConfigProto

// The field of a serialized message, as far as it is one of numbers and pieces with a length; 0 where it is not there.
int64_t field_of(const uint8_t* at, const uint8_t* end, uint64_t wanted) {
  auto number = [&](uint64_t* value) {
    *value = 0;
    for (int shift = 0; at < end && shift < 64; shift += 7) {
      *value |= uint64_t(*at & 127) << shift;
      if (!(*at++ & 128)) return true;
    }
    return false;
  };
  int64_t found = 0;
  for (uint64_t key, value; at < end && number(&key);) {
    switch (key & 7) {
      case 0:
        if (!number(&value)) return found;
        if (key >> 3 == wanted) found = int64_t(value);
        break;
      case 1: if (end - at < 8) return found; at += 8; break;
      case 2: if (!number(&value) || uint64_t(end - at) < value) return found; at += value; break;
      case 5: if (end - at < 4) return found; at += 4; break;
      default: return found;
    }
  }
  return found;
}

// What TensorFlow itself takes where nothing is configured.
int usual_threads() {
  const char* named = std::getenv("TF_NUM_INTRAOP_THREADS");
  int count = named ? std::atoi(named) : 0;
  return count > 0 ? count : std::max(1, int(std::thread::hardware_concurrency()));
}

}  // namespace

int configured_threads(TF_OpKernelContext* context) {
  // Asking for the configuration goes through the function library of the run, unchecked. There is none where TensorFlow
  // computes constants; such runs have the step number 0 or a small negative one. Sessions count from 1, all others draw 64 bits.
  int64_t step = tf.StepId(context);
  if (step <= 0 && step > -1000) return 0;
  Status status;
  TF_Buffer* config = tf.NewBuffer();
  tf.GetSerializedConfigProto(context, config, status);
  int64_t configured = 0;
  if (tf.GetCode(status) == ok && config->data) {
    const uint8_t* at = static_cast<const uint8_t*>(config->data);
    configured = field_of(at, at + config->length, intra_op_field);
  }
  tf.DeleteBuffer(config);
  return configured > 0 ? int(std::min<int64_t>(configured, 1 << 16)) : usual_threads();
}

}  // namespace tensorflow
}  // namespace paring
