# Everything happens in .venv, which the first command makes. Needs Python >= 3.10, a C compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TIMED := $(BIN)/python -m pytest benchmarks --benchmark-quiet
BASELINE := file://./.benchmarks/baseline
SOURCES := pyproject.toml setup.py $(wildcard pyx_xent/*.p* pyx_xent/*.h pyx_xent/_kernels/*.p* pyx_xent/_kernels/*.h)

.PHONY: demo test bench bench-turns bench-quick bench-save bench-compare asan clang trust lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	$(BIN)/python examples/train_digits.py

test: $(VENV)/test
	$(BIN)/python -m pytest

bench: $(VENV)/bench
	$(TIMED) --benchmark-save=full --benchmark-storage=file://./.benchmarks/full
	$(BIN)/python -m benchmarks memory
	$(BIN)/python -m benchmarks scaling
	$(BIN)/python -m benchmarks linear
	$(BIN)/python -m benchmarks report

# The table of figures, by turns: two hours. `make bench` afterwards has it in its report. OLDER=FOLDER and CLANG=FOLDER, built
# in place beforehand, add the comparison with an older checkout and with clang's build.
OLDER ?=
CLANG ?=
bench-turns: $(VENV)/bench
	$(BIN)/python -m benchmarks turns $(if $(OLDER),--older "$(OLDER)") $(if $(CLANG),--clang "$(CLANG)")

bench-quick: $(VENV)/bench
	$(TIMED) -m quick

# Ours alone, before a change and after it.
bench-save: $(VENV)/bench
	$(TIMED) -m "quick and ours" --benchmark-save=baseline --benchmark-storage=$(BASELINE)

bench-compare: $(VENV)/bench
	@ls .benchmarks/baseline/*/*.json >/dev/null 2>&1 || { echo 'Nothing to compare with: run "make bench-save" first.'; exit 1; }
	$(TIMED) -m "quick and ours" --benchmark-compare --benchmark-compare-fail=min:15% --benchmark-storage=$(BASELINE)

# The fuzzer, many callers and the tests with gcc's sanitizers, then bugs that the fuzzer has to find.
asan: $(VENV)/trust
	$(BIN)/python -m trust sanitize --calls 100000
	$(BIN)/python -m trust plant

# clang's build in a temporary copy: the bits of gcc's, and the tests.
clang: $(VENV)/trust
	$(BIN)/python -m trust clang

# All of trust/, in about an hour, and TRUST.md of what it found. It uses what is installed beforehand of PyTorch,
# and a free-threaded Python where there is one. AARCH64=FOLDER adds aarch64: FOLDER holds the emulated Python, made at first.
CHECKS := accuracy exp bits clang fuzz sanitize plant valgrind races interrupts forks callers limits imports sizes memory
AARCH64 ?=
FREE_THREADED ?= $(shell command -v python3.14t || command -v python3.13t)
trust: $(VENV)/trust
	@for tool in valgrind qemu-x86_64 clang-19; do command -v $$tool >/dev/null || \
	{ echo "$$tool is missing. Debian: apt install gcc valgrind qemu-user clang-19 libomp-19-dev libclang-rt-19-dev"; exit 1; }; done
	set -e; for check in $(CHECKS); do $(BIN)/python -m trust $$check; done
	$(BIN)/python -m trust emulate --aarch64 "$(AARCH64)"
	$(BIN)/python -m trust free-threaded --python "$(FREE_THREADED)"
	$(BIN)/python -m trust report

lint: $(VENV)/test
	$(BIN)/python -m pip install --quiet ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info pyx_xent/*.c pyx_xent/*.so pyx_xent/_kernels/*.c pyx_xent/_kernels/*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra: built again when a source is newer.
$(VENV)/demo $(VENV)/test $(VENV)/bench $(VENV)/trust: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --editable ".[$(@F)]"
	touch $@
