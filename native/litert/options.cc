#include "options.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "../core/cpu.h"
#include "text.h"

namespace paring {
namespace litert {
namespace {

bool read_number(const char* value, double low, double high, double* out) {
  char* end;
  double v = strtod(value, &end);
  if (end == value || *end || !(v >= low && v <= high)) return false;
  *out = v;
  return true;
}

bool read_flag(const char* value, bool* out) {
  for (const char* yes : {"true", "True", "1"})
    if (!strcmp(value, yes)) return *out = true, true;
  for (const char* no : {"false", "False", "0"})
    if (!strcmp(value, no)) return *out = false, true;
  return false;
}

std::string available_isas() {
  std::string all;
  for (int i = 0; i < isa_count; i++)
    if (isa_available(Isa(i))) all += (all.empty() ? "" : ", ") + std::string(isa_name(Isa(i)));
  return all;
}

}  // namespace

bool read_options(const char* const* keys, const char* const* values, size_t count, Options* o, std::string* message) {
  for (size_t i = 0; i < count; i++) {
    const char *key = keys[i], *value = values[i];
    std::string expected;
    double number = 0;
    if (!strcmp(key, "sparsity_threshold")) {
      if (!read_number(value, 0, 1, &o->threshold)) expected = "a number from 0 to 1";
    } else if (!strcmp(key, "num_threads")) {
      if (!read_number(value, -1, 1024, &number) || number != std::floor(number)) expected = "a whole number up to 1024";
      o->threads = number > 0 ? int(number) : 0;
    } else if (!strcmp(key, "verbose")) {
      if (!read_flag(value, &o->verbose)) expected = "true or false";
    } else if (!strcmp(key, "measure")) {
      if (!read_flag(value, &o->measure)) expected = "true or false";
    } else if (!strcmp(key, "isa")) {
      Isa isa;
      if (!isa_from_name(value, &isa) || !isa_available(isa)) expected = "one of " + available_isas();
      o->isa = value;
    } else {
      *message = text("cannot make the delegate for option '%s': expected one of sparsity_threshold, isa, verbose, num_threads, measure. "
                      "Check its spelling.", key);
      return false;
    }
    if (!expected.empty()) {
      *message = text("cannot make the delegate for option '%s': expected %s, got '%s'. Change or drop it.", key, expected.c_str(), value);
      return false;
    }
  }
  return true;
}

}  // namespace litert
}  // namespace paring
