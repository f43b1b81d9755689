# Two commands do all the set-up: `make demo` and `make test`, each from nothing.
PYTHON ?= python3
VENV := .venv
SPECWISE := $(VENV)/bin/specwise
# For two cores: many tests wait, for a server or for a process. Each worker gets one thread for its
# matrices, since the threads of three would only wait for each other.
WORKERS ?= 3

# Containers set it; then each of the hundreds of processes that tests start compiles everything.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint lock clean

demo: $(VENV)/.installed
	$(SPECWISE) engine install
	$(SPECWISE) demo

test: $(VENV)/.installed-dev
	scripts/install-chromium
	scripts/install-prometheus $(VENV)/prometheus
	$(SPECWISE) engine install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	OPENBLAS_NUM_THREADS=1 $(VENV)/bin/pytest -m "not alone" --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(VENV)/bin/pytest -m alone

$(VENV)/.installed: requirements/runtime.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --require-hashes -r requirements/runtime.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: requirements/dev.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --require-hashes -r requirements/dev.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@ $(VENV)/.installed

# Resolve the pinned lists anew, after a change of dependencies in pyproject.toml.
lock:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet pip-tools
	$(VENV)/bin/pip-compile --quiet --generate-hashes --strip-extras --no-emit-index-url \
	  --no-emit-trusted-host --no-emit-find-links --allow-unsafe \
	  --output-file requirements/runtime.lock pyproject.toml requirements/build.in
	$(VENV)/bin/pip-compile --quiet --generate-hashes --strip-extras --no-emit-index-url \
	  --no-emit-trusted-host --no-emit-find-links --allow-unsafe --extra dev \
	  --output-file requirements/dev.lock pyproject.toml requirements/build.in

clean:
	rm -rf $(VENV)
