# make demo    the main job on real input, some minutes after the installation
# make test    the tests (those of services that are absent skip, and fail when CI=true)
# make check   ruff and mypy
# make schemas  publish the JSON schemas of what the verbs print with --json
# make evidence  the long measurements that the tests leave out
#
# On Linux plain `pip install torch` brings gigabytes of CUDA. For the CPU build give the address of an index that has
# it: make demo TORCH_INDEX=<address>
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.netassay-installed

.PHONY: demo test check schemas evidence install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV). PyTorch is the large part: some 200 MB for a CPU build; from the default index of pip"
	@echo "on Linux some 3 GB with CUDA (for the CPU build: make $(MAKECMDGOALS) TORCH_INDEX=<index of CPU builds>)."
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --constraint constraints.txt --index-url $(TORCH_INDEX) torch)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[compute,embedded,s3,dev]'
	@touch $@

demo: $(INSTALLED)
	VENV=$(VENV) scripts/demo.sh

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

evidence: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

schemas: $(INSTALLED)
	$(BIN)/python -m producer.cli.output docs/schemas

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache
