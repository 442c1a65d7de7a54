"""Fails when a tracked source file has 600 lines or more: time to divide it."""

import subprocess
import sys
from pathlib import Path

LIMIT = 600
PATTERNS = ("*.py", "*.cpp", "*.h", "*.c", "*.cu", "*.cuh", "*.md", "*.toml", "CMakeLists.txt", "Makefile")

names = subprocess.run(["git", "ls-files", *PATTERNS], check=True, capture_output=True, text=True).stdout.split("\n")
lengths = {name: len(Path(name).read_bytes().splitlines()) for name in names if name and Path(name).exists()}
too_long = {name: n for name, n in lengths.items() if n >= LIMIT}
for name, n in too_long.items():
    print(f"{name}: {n} lines, allowed: fewer than {LIMIT}")
sys.exit(1 if too_long else 0)
