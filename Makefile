# make demo    set up .venv, plan, train and check the byte-level GPT on 8 virtual CPU devices
# make test    set up .venv, run the tests
#
# Another Python:  make test PYTHON=python3.13 VENV=.venv-3.13
# Some tests:      make test ARGS="tests/passes -k reshard"
# The TPU compiler's tests too (no TPU needed):  make test EXTRAS=dev,examples,verify-tpu

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,examples
JOBS ?= logical
ARGS ?=

comma := ,
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
PYTEST := -m pytest --no-header -q -rfEs -n $(JOBS) --maxprocesses=4 --dist=worksteal

.PHONY: demo test lint types format notebooks bench contest accuracy experts fit rank schedules tables wheel-test clean

demo: $(INSTALLED)
	$(BIN)/python examples/02_byte_gpt.py

test: $(INSTALLED)
	$(BIN)/python $(PYTEST) $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each .ipynb anew from the .py file beside it, with its plots: a minute.
notebooks: $(INSTALLED)
	PYTHONPATH=$(CURDIR) $(BIN)/python examples/notebooks/run_notebooks.py $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m pytest --no-header -q -s -o python_files="bench_*.py" tests/benchmarks $(ARGS)

# The solver on five instances of the IOPDDL contest, within its time limits: six minutes.
contest: $(INSTALLED)
	PYTHONPATH=. $(BIN)/python tests/benchmarks/contest.py $(ARGS)

# Predictions against the real compilers, and docs/accuracy.md: minutes for each plan that is new.
# What was compiled before is only predicted again:  make accuracy ARGS="--known"
accuracy: $(INSTALLED)
	PYTHONPATH=.:examples:tests/accuracy JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=true \
	    $(BIN)/python tests/accuracy/collect.py $(ARGS)
	PYTHONPATH=.:examples:tests/accuracy $(BIN)/python tests/accuracy/accuracy_report.py

# Plans against what experts write by hand, by the TPU's compiler: a minute or more for each version.
experts: $(INSTALLED)
	PYTHONPATH=.:examples:tests/accuracy JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=true \
	    $(BIN)/python tests/accuracy/experts.py $(ARGS)

# The constants of [chip.fitted] of TPUs, from tests/data/tpu_cycles.csv; `--compile` adds to it first.
fit: $(INSTALLED)
	PYTHONPATH=.:tests/accuracy JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=true \
	    $(BIN)/python tests/accuracy/fit_compute.py $(ARGS)

# The order of plans by their predictions, and by steps on 8 virtual CPU devices: some ten minutes.
rank: $(INSTALLED)
	PYTHONPATH=.:examples JAX_PLATFORMS=cpu $(BIN)/python tests/accuracy/rank_cpu.py $(ARGS)

# Every schedule on every model against plain jit, on 8 virtual CPU devices: an hour or so for all.
schedules: $(INSTALLED)
	PYTHONPATH=.:examples:tests/autoshard JAX_PLATFORMS=cpu $(BIN)/python tests/accuracy/every_schedule.py $(ARGS)

# Predictions against published step times: some five minutes.
tables: $(INSTALLED)
	PYTHONPATH=.:tests/accuracy JAX_PLATFORMS=cpu $(BIN)/python tests/accuracy/published_tables.py $(ARGS)

# The wheel alone, in a fresh environment, with the checkout out of sight.
WHEEL_VENV := $(CURDIR)/.venv-wheel
AWAY := $(WHEEL_VENV)/elsewhere
# What a wheel may lack: every module and its examples, data, commands, documents, and a run.
WHEEL_TESTS := tests/test_*.py tests/cost_models tests/autoshard/test_cli*.py \
    tests/autoshard/test_parallelize.py tests/autoshard/test_verification.py

wheel-test: $(INSTALLED)
	rm -rf dist $(WHEEL_VENV)
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .
	$(PYTHON) -m venv $(WHEEL_VENV)
	wheel=$$(ls dist/*.whl) && $(WHEEL_VENV)/bin/pip install --quiet --disable-pip-version-check \
	    "$$wheel[examples]" hypothesis pytest pytest-xdist
	mkdir $(AWAY) && cp -R tests examples docs *.md LICENSE pyproject.toml $(AWAY)
	cd $(AWAY) && env -u PYTHONPATH ../bin/python $(PYTEST) -m "not slow" $(WHEEL_TESTS) $(ARGS)

clean:
	rm -rf .venv .venv-* dist build

# Written anew when pyproject.toml changes; `make test` twice installs once.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	    "autoshard needs Python 3.11 or newer; name one: make PYTHON=python3.13 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV) for $$($(PYTHON) --version): about 1 GB, a minute or two."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	@touch $@
