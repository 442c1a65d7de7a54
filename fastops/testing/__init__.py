"""Helpers for testing kernels against the reference: tolerances, guard pages."""

from fastops.testing.compare import assert_matches
from fastops.testing.guards import guarded

__all__ = ["assert_matches", "guarded"]
