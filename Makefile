# The verbs of the project; `make` lists them. All of them work in .venv, but for `bench`.
# ARGS=... is handed on, and PYTHON=... chooses the interpreter of .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
BENCH := .venv-bench
EXTENSIONS := metastore._codec metastore._commit metastore._merge

.DEFAULT_GOAL := help
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# What must be there before anything can be installed; systems that split Python into
# packages forget the last two.
define NEEDED
import os, sys, sysconfig
assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=..."
header = os.path.join(sysconfig.get_path("include"), "Python.h")
assert os.path.exists(header), f"{header} is missing: install python3-dev"
import ensurepip, venv
endef
export NEEDED

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

setup: $(BUILT)  ## create .venv and install metastore into it, editable

# After a change of the metadata everything is installed anew; after a change of the
# extensions' sources they alone are rebuilt, without the network.
$(BUILT): pyproject.toml setup.py $(wildcard metastore/*.pyx metastore/*.h)
	@set -e; if [ ! -x $(BIN)/pip ]; then \
	    $(PYTHON) -c "$$NEEDED" && $(PYTHON) -m venv --clear $(VENV); \
	fi
	@if [ ! -e $(INSTALLED) ] || [ pyproject.toml -nt $(INSTALLED) ]; then \
	    set -ex; \
	    $(BIN)/python -m pip install --quiet -e '.[dev,demo]'; \
	    touch $(INSTALLED); \
	else \
	    set -x; \
	    $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .; \
	fi
	@touch $@

# The extras that only some verbs need: docs, fuzz, matrix.
$(VENV)/.extra-%: pyproject.toml | setup
	$(BIN)/python -m pip install --quiet -e '.[$*]'
	@touch $@

demo: setup  ## watch data go in, a process die, and everything come back
	$(BIN)/metastore demo $(ARGS)

test: setup lint types  ## lint, types and the tests
	$(BIN)/python -m pytest $(ARGS)

lint: setup  ## ruff and cython-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint metastore

types: setup  ## mypy --strict, and the stubs held to the extensions
	$(BIN)/mypy --strict metastore
	$(BIN)/python -m mypy.stubtest $(EXTENSIONS)

# Each campaign tells its seed and its counts in one line, `campaign NAME: ...`, at its
# end; -k goes on behind one that found something. METASTORE_TEST_SEED=... repeats them.
# STRESS_SECONDS is how long the fuzzer runs, by itself under a sanitizer; the others
# take as long on a second processor, and their files say which variables size them.
STRESS_SECONDS ?= 3600
CAMPAIGN := $(BIN)/python -m pytest -m slow -s -rs --timeout 0
CAMPAIGNS := test_crash_states test_crowd test_processes test_damage

stress: stress-fuzz $(CAMPAIGNS:%=stress-%) stress-rest  ## the long campaigns: make -j2 -k stress

stress-test_%: setup
	$(CAMPAIGN) tests/test_$*.py $(ARGS)

stress-rest: setup
	$(CAMPAIGN) $(CAMPAIGNS:%=--ignore tests/%.py) --ignore tests/test_fuzz.py $(ARGS)

stress-fuzz: setup
	METASTORE_FUZZ_SECONDS=$(STRESS_SECONDS) $(MAKE) sanitize \
	    ARGS="-m slow -s --timeout 0 tests/test_fuzz.py $(ARGS)"

FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.extra-fuzz  ## coverage-guided fuzzing, by atheris (Linux)
	$(BIN)/python tests/fuzz_guided.py -max_total_time=$(FUZZ_SECONDS) -max_len=4096 $(ARGS)

# The peers are nothing to develop with: they have an environment of their own, of the
# same Python. The extensions lie in the tree, so that `setup` rebuilds them for both.
$(BENCH)/.installed: pyproject.toml | setup
	$(BIN)/python -m venv --clear $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet -e '.[bench]'
	@touch $@

# A report has the tables of all cases, so that a run of some writes none by itself.
bench: $(BENCH)/.installed  ## all benchmarks, into docs/performance.md (one to two hours)
	$(BENCH)/bin/python -m benchmarks --json benchmarks/results.json \
	    $(if $(findstring --only,$(ARGS)),,--report) $(ARGS)

bench-quick: setup  ## every benchmark at a hundredth of its size: does it run?
	$(BIN)/python -m benchmarks --scale 0.01 --repeat 1 --peers none $(ARGS)

instructions: setup  ## what the kernels cost, in instructions, against the baseline
	$(BIN)/python -m benchmarks.instructions $(ARGS)

# A flavour of the extensions lives in a copy of the tree, so that .venv keeps the one
# that users get. What checks the tree itself has nothing to say there.
define flavour
	rm -rf build/$(1)
	mkdir -p build/$(1)
	cp -R $(wildcard *.md *.py *.toml LICENSE docs metastore tests) build/$(1)
	rm -f build/$(1)/metastore/*.so
	cd build/$(1) && $(2)=1 $(CURDIR)/$(BIN)/python setup.py --quiet build_ext --inplace
endef
NOT_TREE := --ignore tests/test_house.py --ignore tests/test_layers.py \
	--ignore tests/test_package.py

debug: setup  ## the tests with the checks of Cython and of C on
	$(call flavour,debug,METASTORE_DEBUG)
	cd build/debug && $(CURDIR)/$(BIN)/python -m pytest $(NOT_TREE) $(ARGS)

# Python frees little at its end, hence no leak detection; and its own allocator would
# hide the ends of objects from the sanitizer. A finding ends the process: pytest must
# not hold back what it says.
sanitize: setup  ## the tests under AddressSanitizer and UBSan (gcc on Linux)
	$(call flavour,sanitize,METASTORE_SANITIZE)
	cd build/sanitize && \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	    UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
	    $(CURDIR)/$(BIN)/python -m pytest --capture=sys --timeout 1200 $(NOT_TREE) $(ARGS)

# Coverage of an extension can be missing in silence: the last line says if it is. Its
# plugin wants the generated C beside the source.
coverage: setup  ## what the tests reach, of the extensions too
	$(call flavour,coverage,METASTORE_COVERAGE)
	cp build/coverage/build/cython-coverage/metastore/*.c build/coverage/metastore/
	cd build/coverage && \
	    { $(CURDIR)/$(BIN)/coverage run -m pytest --timeout 1200 $(NOT_TREE) $(ARGS); \
	    status=$$?; $(CURDIR)/$(BIN)/coverage report | tee report.txt; exit $$status; }
	grep -q '_codec\.pyx' build/coverage/report.txt
	grep -q '_commit\.pyx' build/coverage/report.txt
	grep -q '_merge\.pyx' build/coverage/report.txt

matrix: $(VENV)/.extra-matrix  ## the tests on every Python that is installed
	$(BIN)/nox $(ARGS)

docs: $(VENV)/.extra-docs  ## the documentation, as HTML in docs/_build
	$(BIN)/python -m sphinx -n -W --keep-going docs docs/_build/html

clean:  ## remove everything that was built, both environments too
	rm -rf $(VENV) $(BENCH) build dist docs/_build *.egg-info .nox
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	rm -f metastore/*.so
	find . -name __pycache__ -exec rm -rf {} +

.PHONY: bench bench-quick clean coverage debug demo docs fuzz help instructions lint \
	matrix sanitize setup stress stress-fuzz stress-rest test types
