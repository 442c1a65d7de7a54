"""Fails when a tracked source file has 600 lines or more: time to divide it."""

import subprocess
import sys
from pathlib import Path

LIMIT = 600
PATTERNS = ["*.py", "*.cpp", "*.h", "*.c", "*.cu", "*.cuh", "*.md", "CMakeLists.txt", "Makefile"]

listing = subprocess.run(["git", "ls-files", *PATTERNS], check=True, capture_output=True, text=True)
names = [name for name in listing.stdout.splitlines() if Path(name).exists()]
lengths = {name: len(Path(name).read_bytes().splitlines()) for name in names}
too_long = {name: n for name, n in lengths.items() if n >= LIMIT}
for name, n in too_long.items():
    print(f"{name}: {n} lines, allowed: fewer than {LIMIT}")
sys.exit(1 if too_long else 0)
