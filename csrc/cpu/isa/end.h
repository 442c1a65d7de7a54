// Closes what a begin_<isa>.h opened.
#pragma GCC pop_options
#undef FASTOPS_ISA
#undef FASTOPS_HAS_BF16_DOT
#undef FASTOPS_HAS_VNNI
#undef FASTOPS_IS_INTEL
#undef FASTOPS_HAS_AMX
#undef FASTOPS_AMX_EMULATE
