# `make demo` and `make test` work on a fresh machine: both create .venv and install what they need.
PYTHON ?= python3
BIN := .venv/bin
# lines that the package without research/ may have; it may fall
BUDGET := 18356
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test quick lint clean

demo: .venv/installed
	$(BIN)/slrprop demo

# workers and what they start share the cores: a thread each; some of their tests wait, so three of them keep two cores busy
test: .venv/installed lint
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/pytest

# the fastest tests: those that together took a tenth of the time when all last ran
quick: .venv/installed
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/pytest --quick

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@lines=$$(find src -name '*.py' -not -path '*/research/*' -exec cat {} + | wc -l); test $$lines -le $(BUDGET) || \
		{ echo "the package without research/ has $$lines lines, more than the $(BUDGET) it may have: delete as you add"; exit 1; }

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist
