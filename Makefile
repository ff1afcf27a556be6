# `make demo` and `make test` need only Python 3.10+, pip and a package index: each makes or reuses
# .venv. Paths are relative throughout, so a checkout may stand in a folder with spaces in its name.

SHELL := /bin/sh
PYTHON ?= python3
ARGS ?=
# The versions that were tested; `CONSTRAINTS=` installs the newest of everything instead.
CONSTRAINTS ?= constraints.txt
RESOLUTION ?= highest
BIN := .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
DIGITS := examples/digits

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format docs wheel bench conformance constraints clean

help:
	@echo 'make demo         quantize, tune and report the handwritten-digits example; report in runs/'
	@echo 'make test         all tests, with coverage   (ARGS="-k cache" and the like go to pytest)'
	@echo 'make test-fast    the tests that take seconds'
	@echo 'make lint         ruff and mypy              make format   let ruff rewrite'
	@echo 'make docs         the documentation as a site in build/site; a warning is an error'
	@echo 'make wheel        dist/*.whl                 make bench    benchmarks (ARGS="--help")'
	@echo 'make constraints  write constraints.txt anew: the newest versions that fit together'
	@echo 'make clean        remove .venv, runs and all that was built'
	@echo 'PYTHON=...        the interpreter that .venv is made with (now: $(PYTHON)); 3.10 or newer'
	@echo 'CONSTRAINTS=...   the versions to install (now: $(CONSTRAINTS)); nothing for the newest'

# $(call venv): .venv, made anew if this checkout was moved or its interpreter is gone.
define venv
	@if ! $(BIN)/python -c '' 2>/dev/null || ! grep -sqxF "$(CURDIR)" .venv/made-in; then \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo 'trtune needs Python 3.10 or newer, but PYTHON=$(PYTHON) is' \
	      "$$("$(PYTHON)" --version 2>&1 || true); give another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }; \
	  echo 'making .venv'; rm -rf .venv; \
	  "$(PYTHON)" -m venv .venv || { rm -rf .venv; \
	    echo 'could not make .venv; on Debian and Ubuntu: apt install python3-venv' >&2; exit 2; }; \
	  printf '%s\n' "$(CURDIR)" > .venv/made-in; \
	fi
endef

# $(call install,EXTRA): .venv with this package (editable) and EXTRA's dependencies. The stamp
# holds what decides the result, so that other requirements install again.
define install
	$(call venv)
	@key="$$(cat pyproject.toml $(if $(CONSTRAINTS),'$(CONSTRAINTS)') | cksum) $(CURDIR)"; \
	stamp=.venv/installed-$(1); \
	if test "$$(cat "$$stamp" 2>/dev/null)" = "$$key"; then exit 0; fi; \
	echo 'installing trtune[$(1)] into .venv (the first time this downloads some 600 MB)'; \
	$(PIP) install --quiet $(if $(CONSTRAINTS),-c '$(CONSTRAINTS)',--upgrade --upgrade-strategy eager) \
	  -e '.[$(1)]' && printf '%s\n' "$$key" > "$$stamp"
endef

demo:
	$(call install,examples)
	@test -f $(DIGITS)/data/calibration.npz && test -f $(DIGITS)/data/test.npz || $(BIN)/python $(DIGITS)/prepare.py
	@if $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("tensorrt_rtx"))'; \
	then set -x; $(BIN)/trtune run $(DIGITS)/digits.yaml --out runs; \
	else echo 'TensorRT-RTX has no package for this machine: onnxruntime alone'; \
	  $(BIN)/trtune run $(DIGITS)/digits.yaml --out runs --set 'backends=[{name: onnxruntime}]'; fi

# Bare pytest: `python -m pytest` would put the root, and with it a top-level `datasets`, on the path.
test:
	$(call install,dev)
	$(BIN)/pytest -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=90 $(ARGS)

test-fast:
	$(call install,dev)
	$(BIN)/pytest -n 2 -m 'not slow' $(ARGS)

lint:
	$(call install,dev)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p trtune

format:
	$(call install,dev)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs:
	$(call install,docs)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'build/site/index.html'

wheel:
	$(call install,dev)
	rm -rf build dist
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

bench:
	$(call install,dev)
	$(BIN)/python benchmarks/calibration.py $(ARGS)

conformance:
	$(call install,dev)
	$(BIN)/python -W ignore benchmarks/conformance.py $(ARGS)

# One file for every Python and platform. RESOLUTION=lowest-direct writes the oldest versions that
# pyproject.toml allows.
constraints:
	$(call venv)
	$(PIP) install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra docs --extra examples --upgrade --quiet \
	  --universal --python-version 3.10 --resolution $(RESOLUTION) --no-annotate \
	  --no-emit-index-url --custom-compile-command 'make constraints' --output-file '$(CONSTRAINTS)'

clean:
	rm -rf .venv build dist runs *.egg-info .coverage .coverage.* $(DIGITS)/data $(DIGITS)/runs
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
