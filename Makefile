# The doors to the checkout: `make demo` and `make test` need python3 (3.11+), a C++ compiler,
# make, git and a package index; everything else is installed into .venv by `make setup`.

PYTHON ?= python3
MODEL ?= smollm2-135m
PROMPT ?= Explain in two sentences why the sky is blue.
CALLS ?= 20000

VENV := .venv
BIN := $(VENV)/bin
# Stamps: a step is repeated when what it depends on is newer.
SETUP := $(VENV)/setup.stamp
DEV := $(VENV)/dev.stamp
SOURCES := $(wildcard csrc/* csrc/*/*) CMakeLists.txt pyproject.toml
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.h tests/cpp/*)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet

.PHONY: help setup demo test fuzz kernels lint format clean

help:
	@echo "make setup   .venv with the elinvar command in it"
	@echo "make demo    a real model answers (MODEL=$(MODEL), PROMPT=...)"
	@echo "make test    lint and tests"
	@echo "make fuzz    20,000 made-up calls of a server (CALLS=...)"
	@echo "make kernels compiles the kernels for all GPUs that are known, and keeps the figures"
	@echo "make lint    ruff, mypy, import-linter, clang-format"
	@echo "make format  rewrite the sources in the house format"
	@echo "make clean   remove .venv and build (the model cache stays: elinvar models remove)"

setup: $(SETUP)
	@echo "Ready: $(BIN)/elinvar, or source $(BIN)/activate"

$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.11 or newer, or name one with PYTHON=/path/to/python3."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) -V) is too old: Elinvar needs Python 3.11 or newer, name one with PYTHON=/path/to/python3."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments: install its venv package (Debian and Ubuntu: apt-get install python3-venv)."; exit 1; }
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(SETUP): $(VENV)/pyvenv.cfg $(SOURCES)
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "make: no C++ compiler found: install one (Debian and Ubuntu: apt-get install g++) or name it with CXX=..."; exit 1; }
	@$(BIN)/python -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "make: the headers of $$($(BIN)/python -V) are missing: install them (Debian and Ubuntu: apt-get install python3-dev)."; exit 1; }
	@echo "Building the kernels and installing elinvar into $(VENV)"
	@$(PIP) --editable .
	@touch $@

# The extras alone, so that the extension is not built a second time.
$(DEV): $(SETUP) pyproject.toml
	@echo "Installing what tests and linters need into $(VENV)"
	@$(BIN)/python -c 'import tomllib; e = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print(*e["test"], *e["lint"], sep="\n")' > $(VENV)/dev.txt
	@DISABLE_CUDA=1 $(PIP) --requirement $(VENV)/dev.txt # else hqq looks for a CUDA compiler
	@$(PIP) --no-deps $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["clients"])')
	@touch $@

demo: $(SETUP)
	@$(BIN)/elinvar pull $(MODEL) >/dev/null
	@$(BIN)/elinvar generate $(MODEL) --chat --temperature 0 --max-tokens 96 --prompt "$(PROMPT)"

# Lint goes first: it is quick, and the tests' summary is what should be read last.
test: lint
	@$(BIN)/python -m pytest -n 2 --dist loadfile

fuzz: $(DEV)
	@PYTHONPATH=tests $(BIN)/python tests/fuzz_server.py --calls $(CALLS)

kernels: $(DEV)
	@$(BIN)/python benchmarks/kernels/compile.py --update

lint: $(DEV)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "make: ruff would reformat files: run 'make format'."; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@out=$$($(BIN)/lint-imports --no-logo --no-cache 2>&1) || { echo "$$out"; exit 1; }
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	@echo "lint: ruff, mypy, import-linter and clang-format found nothing"

format: $(DEV)
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build
