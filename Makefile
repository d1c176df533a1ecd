# Everything sets itself up: a virtual environment in .venv, the dependencies, the native build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
PIP := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt
# Of the evidence: the folder with the pictures, and how large it is.
DATA ?= ../shared/data
SCALE ?= auto
# The Triton kernels without a GPU, in Triton's interpreter: only where triton is chosen, as the rest has run already.
# (The golden vectors take it a minute each: in test-all.)
INTERPRETED := tests/test_density_mask.py tests/test_masked_statistics.py tests/test_norm_double_backward.py -k triton
# One process of one thread a core. A file's tests share what they trained.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

.PHONY: help demo evidence evidence-photos test test-all bench docs lint types format sdist clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Build tools first: the package itself is then built against the torch that it runs with.
$(VENV)/.tools: constraints.txt | $(VENV)/bin/python
	@echo "installing torch and the build tools into $(VENV) (about two minutes the first time)"
	$(PIP) torch setuptools ninja pybind11 numpy
	@touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	@echo "building sib_ext (with nvcc some minutes; SIB_EXT_CUDA=0 leaves the kernels for GPUs out)"
	$(PIP) --no-build-isolation -e '.[lab,test,docs,dev]'
	@$(BIN)/python -m sib_ext.info
	@touch $@

demo: $(VENV)/.installed ## train with and without S-IB on digits on textures; pictures and report in runs/demo
	$(BIN)/sib-lab demo $(ARGS)

evidence: $(VENV)/.installed ## S-IB against its controls on the pictures in DATA; SCALE=small, cpu or gpu; goes on where it was
	$(BIN)/sib-lab evidence "$(DATA)" --scale $(SCALE) --out runs/evidence-$(SCALE) $(ARGS)

evidence-photos: DATA := $(if $(filter file,$(origin DATA)),../shared/data/photos,$(DATA))
evidence-photos: $(VENV)/.installed ## S-IB against its peers on the photographs in DATA, with a network that knows ImageNet; goes on where it was
	$(BIN)/sib-lab evidence-photos "$(DATA)" $(ARGS)

test: $(VENV)/.installed ## the tests
	SIB_EXT_REQUIRE_NATIVE=1 $(PYTEST) $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED)

test-all: $(VENV)/.installed ## the tests and the long ones
	SIB_EXT_REQUIRE_NATIVE=1 $(PYTEST) -m '' $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) -m '' tests/test_golden.py $(INTERPRETED)

bench: $(VENV)/.installed ## the op benchmark; results in benchmarks/results
	$(BIN)/python benchmarks/bench_ops.py $(ARGS)

docs: $(VENV)/.installed ## the documentation as a site, build/docs/index.html
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

lint: $(VENV)/.installed types ## ruff: rules and format; types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed ## mypy: types of both packages
	$(BIN)/mypy

format: $(VENV)/.installed ## ruff: put the code in format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sdist: $(VENV)/.installed ## the source distribution, in dist/
	$(BIN)/python -m build --sdist --no-isolation

clean: ## remove what was built (not .venv)
	rm -rf build dist *.egg-info runs sib_ext/*.so sib_ext/_build.json $(VENV)/.installed
