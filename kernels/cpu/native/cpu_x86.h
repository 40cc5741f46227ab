// What the compiler's __builtin_cpu_supports does not know of everywhere.
#pragma once

namespace quire {

// The AVX-512 of isa_avx512.cpp, and dot products of pairs, of bfloat16 and of 16-bit integers (VNNI).
bool cpu_has_avx512bf16();

// The same, tiles with dot products of bfloat16 pairs and of bytes, and the system's leave to use
// them, which is asked for at the first call.
bool cpu_has_amx();

}  // namespace quire
