"""Adapters for other engines. Each imports its engine inside the function that needs it."""
