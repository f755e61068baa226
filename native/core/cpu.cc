#include "cpu.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace paring {
namespace {

const char* const names[isa_count] = {"portable", "avx2", "avx2vnni", "avx512", "avx512vnni"};

constexpr bool built[isa_count] = {
    true,
#ifdef PARING_HAVE_avx2
    true,
#else
    false,
#endif
#ifdef PARING_HAVE_avx2vnni
    true,
#else
    false,
#endif
#ifdef PARING_HAVE_avx512
    true,
#else
    false,
#endif
#ifdef PARING_HAVE_avx512vnni
    true,
#else
    false,
#endif
};

struct Features { bool has[isa_count], bfloat16; };

Features detect() {
  Features f = {{true, false, false, false, false}, false};
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1;
  if (!osxsave || !avx) return f;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6;   // what the system saves at a task switch
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  bool avx2 = b >> 5 & 1;
  bool avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);   // F, DQ, BW, VL
  bool vnni512 = c >> 11 & 1, vnni = false, bfloat16 = false;
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) vnni = a >> 4 & 1, bfloat16 = a >> 5 & 1;
  f.has[1] = ymm && avx2 && fma;
#ifdef PARING_NARROW_EVEX   // a build for tests only: runs the 256-bit VNNI kernels where only their EVEX form exists
  vnni = zmm && avx512 && vnni512;
#endif
  f.has[2] = f.has[1] && vnni;
  f.has[3] = f.has[1] && zmm && avx512;
  f.has[4] = f.has[3] && vnni512;
  f.bfloat16 = f.has[4] && bfloat16;
#endif
  return f;
}

const Features& features() { static const Features f = detect(); return f; }

Isa best() {
  for (int i = isa_count - 1; i > 0; i--) if (isa_available(Isa(i))) return Isa(i);
  return Isa::portable;
}

std::atomic<int>& chosen() {
  static std::atomic<int> isa([] {
    Isa wanted;
    const char* name = std::getenv("PARING_ISA");
    return int(name && isa_from_name(name, &wanted) && isa_available(wanted) ? wanted : best());
  }());
  return isa;
}

// Bytes of the data cache of a level that this processor has for itself or shares: from the system, whose word counts where
// the C library adds up what other processors have (some AMD).
size_t cache(int level, size_t otherwise) {
  for (int i = 0; i < 8; i++) {
    std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    std::string kind, size;
    int found = 0;
    if (!(std::ifstream(folder + "level") >> found)) break;
    if (found != level || !(std::ifstream(folder + "type") >> kind) || kind == "Instruction" || !(std::ifstream(folder + "size") >> size)) continue;
    size_t unit = size.back() == 'K' ? 1 << 10 : size.back() == 'M' ? 1 << 20 : 1;
    size_t bytes = std::strtoul(size.c_str(), nullptr, 10) * unit;
    if (bytes) return bytes;
  }
  return otherwise;
}

}  // namespace

const char* isa_name(Isa isa) { return names[int(isa)]; }

bool isa_from_name(const char* name, Isa* out) {
  for (int i = 0; i < isa_count; i++) if (!std::strcmp(name, names[i])) { *out = Isa(i); return true; }
  return false;
}

bool isa_available(Isa isa) { return built[int(isa)] && features().has[int(isa)]; }
Isa isa_in_force() { return Isa(chosen().load(std::memory_order_relaxed)); }

bool bfloat16_dots_in_force() {
#ifdef PARING_HAVE_avx512bf16
  return features().bfloat16 && isa_in_force() == Isa::avx512vnni;
#else
  return false;
#endif
}

bool set_isa(Isa isa) {
  if (!isa_available(isa)) return false;
  chosen().store(int(isa), std::memory_order_relaxed);
  return true;
}

const Caches& caches() {
  static const Caches c = {cache(1, 32 << 10), cache(2, 512 << 10), cache(3, 8 << 20)};
  return c;
}

}  // namespace paring
