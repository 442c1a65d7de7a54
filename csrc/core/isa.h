// The instruction-set variants and the choice among them (docs/design/002-isa.md).
#pragma once

namespace fastops {

// amx_emu runs the AMX code on emulated tiles: for tests on machines without AMX, never chosen by itself.
enum class Isa : int { scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx_emu, amx, count };

const char* isa_name(Isa isa);
bool isa_compiled(Isa isa);
bool isa_supported(Isa isa);  // by the processor and the operating system
// Whether the processor looks up bytes in a table of 128 (AVX-512 VBMI): beside `avx512_vnni` and above, where all but
// the first such processors have it.
bool isa_permutes_bytes();
// Whether memory reaches L1 faster by way of L2 where lines are asked for long before they are read: Intel's processors
// (docs/design/002-isa.md).
bool isa_reads_through_l2();
// One relaxed load. Chosen at the first use: FASTOPS_ISA's variant, else the best one supported.
Isa active_isa();
// The sentence that refuses FASTOPS_ISA, or NULL: operators fail with it instead of running something else.
const char* isa_refusal();

}  // namespace fastops
