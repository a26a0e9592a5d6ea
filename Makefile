# Two commands from the README: `make demo` and `make test`. Both make .venv first if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OLDEST ?= .venv-oldest
TESTS ?=
CASES ?= 1000
SEED ?= 0

.PHONY: demo test test-all lint types unit unit-all timing docs oldest cases coverage zoo cuda upstream clean

demo: $(VENV)/installed
	$(BIN)/python examples/quickstart.py

# Each stage says what it is and about how long it takes on two cores.
test: lint types unit timing docs
	@echo "All of it passed; make test-all runs the slow unit tests too."

# What CI runs: the slow tests too.
test-all: lint types unit-all timing docs

lint: $(VENV)/installed
	@echo "Lint: some seconds"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/installed
	@echo "Types: half a minute at first, then some seconds"
	$(BIN)/mypy

# One process for each of two cores, each with one thread: models in tests are small. Each takes
# tests that lie together, which share what is made for them. What takes more than ten seconds is
# left to unit-all, and what compares speeds runs alone.
unit: MARKS = not slow and not timing
unit: SPAN = 12 minutes
unit-all: MARKS = not timing
unit-all: SPAN = 22 minutes
unit unit-all: $(VENV)/installed
	@echo "Unit tests: $(SPAN); a dot is a test"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "$(MARKS)"

timing: $(VENV)/installed
	@echo "Timing tests: two minutes"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m timing \
		$$(grep -rl "mark.timing" --include="test_*.py" tests)

# From the docstrings and docs, without the network; a warning is an error.
docs: $(VENV)/installed
	@echo "Documentation: half a minute"
	$(BIN)/python -m sphinx -W --keep-going --quiet -d build/doctrees docs build/docs

# With the oldest releases that are supported, in an environment of its own: the tests but for the
# slow ones, or those in the files of TESTS alone. What these releases can't do is skipped, and
# listed with the reason.
oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not timing" -rs $(TESTS)

# CASES more of each property test, drawn from SEED; how many were run is added up in build/cases.log.
cases: $(VENV)/installed
	mkdir -p build
	HYPOTHESIS_PROFILE=hunt HYPOTHESIS_EXAMPLES=$(CASES) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/project/test_properties.py -q --show-capture=no \
		--hypothesis-seed=$(SEED) --hypothesis-show-statistics >> build/cases.log; \
		status=$$?; $(BIN)/python tests/count_cases.py build/cases.log; exit $$status

# In one process, some minutes; lines in red are in build/coverage too.
coverage: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov=tp_amp --cov-report=term-missing:skip-covered \
		--cov-report=html:build/coverage

# Measures every model of the zoo and writes the table into docs/models.md.
zoo: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/zoo_table.py

# On a machine with a GPU, in under ten minutes: the tests that need one, and timings, into
# docs/results/gpu.md. Elsewhere it fails with a line that says so.
cuda: $(VENV)/installed
	$(BIN)/python benchmarks/gpu.py

# Torch-Pruning's release with the patches of docs/upstream_patches: its own tests, and theirs.
upstream: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/upstream_patches.py

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev,quantise]'
	touch $@

$(OLDEST)/installed: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --editable '.[dev]' --constraint tests/oldest.txt
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info
