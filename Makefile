# Two commands: make demo, make test. Each sets up .venv by itself.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3.11
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo demo-sms test test-full lint types clean

setup: $(VENV)/.ready

# uv finds torch's CPU build where pip does (find-links), else on PyTorch's CPU index.
$(VENV)/.ready: pyproject.toml
	@echo "Setting up $(VENV) (once)"
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check uv
	@links="$${PIP_FIND_LINKS:-$$($(PY) -m pip config get global.find-links 2>/dev/null || true)}"; \
	if [ -n "$$links" ]; then export UV_FIND_LINKS="$$links"; else export UV_TORCH_BACKEND=cpu; fi; \
	$(VENV)/bin/uv pip install --quiet --python $(PY) -e '.[dev]'
	@touch $@

demo: setup
	@$(VENV)/bin/casemate demo

demo-sms: setup
	@$(VENV)/bin/casemate demo sms

lint: setup
	@$(VENV)/bin/ruff check src tests examples
	@$(VENV)/bin/ruff format --check src tests examples
	@$(VENV)/bin/lint-imports

types: setup
	@$(VENV)/bin/mypy

test: lint types
	@$(PY) -m pytest -m "not full" -n 2

test-full: lint types
	@$(PY) -m pytest -n 2

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache
