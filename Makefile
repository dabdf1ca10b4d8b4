# make demo    the main job on real input, some minutes after the installation
# make test    the tests, two files at a time, or JOBS (those of services that are absent skip, and fail when CI=true)
# make check   ruff and mypy
# make schemas  publish the JSON schemas of what the verbs print with --json
# make bench   netassay beside Celery, RQ and a bare Pool, half an hour; writes docs/benchmarks.md
# make evidence  the long measurements that the tests leave out
# make faults  an hour of kills and other accidents in both kinds of lab, and docs/faults.md from what came of them
#
# On Linux plain `pip install torch` brings gigabytes of CUDA. For the CPU build give the address of an index that has
# it: make demo TORCH_INDEX=<address>
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
# How many files of tests run at once; nothing is shared between them but the machine.
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.netassay-installed

.PHONY: demo test check schemas evidence bench faults install clean

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
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

evidence: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/peers --page docs/benchmarks.md $(ARGS)

FAULTS := build/faults
ASSAY := $(BIN)/python -m tests.faults --seed 1 --evidence $(FAULTS)/evidence --report $(FAULTS)

# A run that finds something ends with 1; the page has to say so all the same.
faults: $(INSTALLED)
	mkdir -p $(FAULTS)
	-$(ASSAY)/embedded-3.json --lab embedded --kills 500 --lost-after 3 & \
	$(ASSAY)/cluster-3.json --lab cluster --kills 500 --lost-after 3; wait
	-$(ASSAY)/embedded-10.json --lab embedded --kills 50 --pause 3 6 --slow 25
	-$(ASSAY)/cluster-10.json --lab cluster --kills 50 --pause 3 6 --slow 25
	-$(ASSAY)/without-claim.json --without claim --kills 40 --lost-after 3 --rest 40 --stop
	-$(ASSAY)/without-fence.json --without fence --kills 40 --lost-after 3 --rest 40 --stop --no-points \
		--only "worker stopped, beyond its lease" --only "compute child killed"
	-$(ASSAY)/without-reconciler.json --without reconciler --kills 40 --lost-after 3 --rest 40 --stop
	$(BIN)/python -m tests.faults.plain_celery --report $(FAULTS)/plain-celery.json
	$(BIN)/python -m tests.faults.page $(FAULTS)/*.json --page docs/faults.md

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

schemas: $(INSTALLED)
	$(BIN)/python -m producer.cli.output docs/schemas

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache
