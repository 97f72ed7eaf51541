# Everything runs in .venv, which the first target that needs it makes.

# Another interpreter: make demo PYTHON=python3.12
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# More pytest options: make test TESTFLAGS="-k easgd -x"
TESTFLAGS ?=
# More options of the demo: make demo DEMOFLAGS="--help"
DEMOFLAGS ?=
# More options of the benchmark: make bench BENCHFLAGS="--quick"
BENCHFLAGS ?=
# More options of the comparison: make compare COMPAREFLAGS="--tau 2 8 --link 200mbit"
COMPAREFLAGS ?=

# The pins hold for the isolated build environments as well; pip 25.3 gave that a name of its own.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(STAMP) ## Train ResNet-18 over two processes, Overlap-Local-SGD next to plain DDP
	$(BIN)/python recipes/demo.py $(DEMOFLAGS)

.PHONY: bench
bench: $(STAMP) ## Measure every algorithm beside the alternatives on shaped links
	$(BIN)/python recipes/bench.py $(BENCHFLAGS)

.PHONY: compare
compare: $(STAMP) ## Run algorithms over a grid of settings and seeds; tables and pictures
	$(BIN)/python recipes/compare.py $(COMPAREFLAGS)

.PHONY: test
test: $(STAMP) ## Run the tests (TESTFLAGS="..." goes to pytest)
	$(BIN)/python -m pytest $(TESTFLAGS)

.PHONY: soak
soak: $(STAMP) ## Run the tests that take many minutes: kills, cut links, thousands of rounds
	$(BIN)/python -m pytest -m soak --numprocesses=0 $(TESTFLAGS)

.PHONY: lint
lint: $(STAMP) ## Check style (ruff) and types (strict mypy)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: format
format: $(STAMP) ## Put the code into the shape that lint wants
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: docs
docs: $(STAMP) ## Build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

.PHONY: pictures
pictures: $(STAMP) ## Draw the documentation's pictures anew
	cd docs && ../$(BIN)/python -m pictures

.PHONY: build
build: $(STAMP) ## Build the wheel and the sdist into dist
	rm -rf dist
	$(BIN)/python -m build

.PHONY: clean
clean: ## Remove the environment and everything built
	rm -rf $(VENV) build dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an install that was cut short is done again. Two -q leave
# only errors to be seen.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) with $(PYTHON): a few minutes, this once"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q -q -e '.[recipes,frameworks,docs,dev]' -c constraints.txt
	@touch $@
