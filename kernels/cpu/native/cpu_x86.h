// What the compiler's __builtin_cpu_supports does not know of everywhere.
#pragma once

namespace quire {

// The AVX-512 of isa_avx512.cpp, and dot products of bfloat16 pairs.
bool cpu_has_avx512bf16();

// The AVX-512 of isa_avx512.cpp, tiles with dot products of bfloat16 pairs, and the system's leave
// to use them, which is asked for at the first call.
bool cpu_has_amx();

}  // namespace quire
