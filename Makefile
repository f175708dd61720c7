# Everything runs in .venv. TORCH names the torch requirement, so that a CPU build can be chosen:
#   make demo TORCH=torch==2.13.0
PYTHON ?= python3
TORCH ?= torch
VENV := .venv
PY := $(VENV)/bin/python

# Processes that share the tests, one thread each.
WORKERS ?= auto

export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint format docs clean

$(VENV)/.installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --editable ".[examples]"
	touch $@

$(VENV)/.developing: $(VENV)/.installed
	$(PY) -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(PY) examples/digits.py --checkpoint runs/digits.pt

# The default leaves out what is marked slow; make test PYTEST_OPTIONS="-m ''" runs everything.
test: $(VENV)/.developing
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_OPTIONS)

lint: $(VENV)/.developing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.developing
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# Reads nothing from the network once it is installed; what is built neither. Warnings are errors.
docs: $(VENV)/.developing
	$(PY) -m sphinx -b html -j auto -E -a -W --keep-going -q docs build/docs
	@echo "build/docs/index.html"

clean:
	rm -rf $(VENV) build dist docs/repository *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
