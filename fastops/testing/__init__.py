"""Helpers for testing kernels against the reference: tolerances, guard pages."""

from fastops.testing.compare import assert_matches
from fastops.testing.guards import guarded

__all__ = ["ROWS_SERVED_BY", "assert_matches", "guarded"]

# What serves the variants without code of their own, for operators over rows (FASTOPS_CHOOSE in csrc/cpu/rows.h).
ROWS_SERVED_BY = {"amx": "avx512_bf16", "amx_emu": "avx512_bf16", "avx512_vnni": "avx512"}
