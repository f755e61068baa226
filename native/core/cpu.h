// What this processor is: instruction set and cache sizes.
#pragma once
#include <cstddef>

namespace paring {

enum class Isa : int { portable = 0, avx2, avx2vnni, avx512, avx512vnni };
constexpr int isa_count = 5;

const char* isa_name(Isa);
bool isa_from_name(const char* name, Isa* out);

// Whether code of `isa` runs here: the processor has it and the system saves its registers.
bool isa_available(Isa);
Isa isa_in_force();            // PARING_ISA where it names one that is available, else the best available one
bool set_isa(Isa);
// Whether dot products of bfloat16 may be used: every processor with them has avx512vnni, which has to be in force.
bool bfloat16_dots_in_force();

struct Caches { size_t l1, l2, l3; };  // bytes; data caches of one core, l3 whole
const Caches& caches();

}  // namespace paring
