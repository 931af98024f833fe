# Everything happens in .venv, which the first command makes. Needs Python >= 3.10, a C compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard pyx_xent/*.p* pyx_xent/*.h pyx_xent/_kernels/*.p*)

.PHONY: demo test bench lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	$(BIN)/python examples/train_digits.py

test: $(VENV)/test
	$(BIN)/python -m pytest

bench: $(VENV)/bench
	$(BIN)/python -m pytest benchmarks

lint: $(VENV)/test
	$(BIN)/python -m pip install --quiet ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info pyx_xent/*.c pyx_xent/*.so pyx_xent/_kernels/*.c pyx_xent/_kernels/*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra: built again when a source is newer.
$(VENV)/demo $(VENV)/test $(VENV)/bench: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --editable ".[$(@F)]"
	touch $@
