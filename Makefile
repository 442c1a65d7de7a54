# The commands of this repository. `make demo` and `make test` need Python 3.11+ and a C++ compiler, nothing else.
PYTHON ?= python3
FASTOPS_VENV ?= .venv
export FASTOPS_VENV
BIN := $(FASTOPS_VENV)/bin
TESTS ?= tests
SOURCES := $(shell git ls-files -co --exclude-standard '*.cpp' '*.h')

.PHONY: help demo test test-asan bench lint format wheel clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: ## a language model (Gemma 3 270M) writes text on this machine, before and after fastops
	$(PYTHON) tools/environment.py demo
	$(BIN)/fastops demo

test: ## the whole test suite (TESTS=tests/ops for a part of it)
	$(PYTHON) tools/environment.py test
	FASTOPS_REQUIRE_NATIVE=1 $(BIN)/python -m pytest $(TESTS)

test-asan: ## the operator tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(PYTHON) tools/environment.py test
	PATH="$(BIN):$$PATH" tools/test_asan.sh

bench: ## measures every operator against torch
	$(PYTHON) tools/environment.py bench
	$(BIN)/fastops bench --compare torch

lint: ## formats, types, file lengths
	$(PYTHON) tools/environment.py dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/python tools/check_lengths.py

format: ## applies what lint checks
	$(PYTHON) tools/environment.py dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

wheel: ## a wheel in dist/
	$(PYTHON) tools/environment.py
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

clean: ## removes what was built (not the environment)
	rm -rf build dist *.egg-info fastops/lib fastops/include fastops/_C*.so
