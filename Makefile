# make demo    see LangChain's VLLM answer through quire's own engine
# make test    linters, types, import rules and the fast tests
# The other targets are listed by `make help`. All of them work in .venv, made on first use.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# The plain python3 where it is in range, else the newest that is; PYTHON=... decides otherwise.
in_range := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	"$$p" -c '$(in_range)' 2>/dev/null && { command -v "$$p"; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --no-input
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/native/*)
ARGS ?=
# Tests run in a process per core, those of a file in one of them, and files in their usual order:
# by their number of tests, the slow suite's longest files, of one test each, would all come last.
# What is given last counts: ARGS="-n 0" is one process, where a debugger can have its terminal.
SPREAD := -n $(shell nproc 2>/dev/null || echo 1) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help
help:
	@echo "make demo        install what the demo needs into $(VENV) and run it"
	@echo "make test        linters, types, import rules, fast tests with coverage (minutes)"
	@echo "make test-slow   soaks, builds, large property runs, lowest allowed versions"
	@echo "make format      let ruff rewrite what it can"
	@echo "make lint|types|imports|unit    one part of 'make test'; unit takes ARGS='-k name -x'"
	@echo "make test-consumers    packages that import vllm, on the stand-in for it"
	@echo "make sanitize    the native kernels' tests under AddressSanitizer and UBSan"
	@echo "make native-check          the native kernels in C++ alone, on every instruction set here"
	@echo "make native-check-arm64    the same for arm64, in qemu; both take ARGS='--quick avx2'"
	@echo "make gpu-check   the GPU kernels against the reference, and benchmarks, on the GPU that is"
	@echo "                 here: eight minutes, with PYTHON's own packages; ARGS=--cpu without one"
	@echo "make wheel       build dist/quire-*.whl"
	@echo "make clean       remove everything that git ignores and make can make again"
	@echo "PYTHON=/path/to/python3.x chooses the interpreter (3.10 to 3.13)"

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.10 to 3.13 found: install one, or say PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c '$(in_range)' || { echo "$(PYTHON) is not Python 3.10 to 3.13"; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) has no venv module: on Debian and Ubuntu, install python3-venv"; exit 1; }

# A stamp says that the install it is named for was done from these very inputs.
$(VENV)/.demo: $(BIN)/python $(INPUTS)
	$(PIP) install --quiet -c constraints.txt -e ".[langchain,outlines]"
	@touch $@

$(VENV)/.dev: $(BIN)/python $(INPUTS)
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.demo

.PHONY: demo
demo: $(VENV)/.demo
	$(BIN)/python -m quire.demo

# mypy and import-linter do not follow an editable install: give them a package made of links.
.PHONY: mirror
mirror:
	@rm -rf .types && mkdir -p .types/quire
	@for f in core_engine/*; do ln -s "../../$$f" .types/quire/; done
	@ln -s ../../kernels ../../integrations .types/quire/

.PHONY: lint
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: types
types: $(VENV)/.dev mirror
	$(BIN)/mypy

.PHONY: imports
imports: $(VENV)/.dev mirror
	PYTHONPATH=.types $(BIN)/lint-imports

.PHONY: unit
unit: $(VENV)/.dev
	$(BIN)/pytest -m "not slow" $(ARGS)

.PHONY: test
test: lint types imports
	$(BIN)/pytest -m "not slow" $(SPREAD) --cov --cov-report=term --durations=10 $(ARGS)

.PHONY: test-slow
test-slow: $(VENV)/.dev test-lower
	HYPOTHESIS_PROFILE=slow $(BIN)/pytest -m slow $(SPREAD) --durations=10 $(ARGS) \
		|| { status=$$?; [ $$status -eq 5 ] && echo "no slow tests selected" || exit $$status; }

# The lowest versions that pyproject.toml allows, in an environment of their own, with the langchain
# that still has `langchain.chains`. Left out are the comparisons with transformers, which are with
# the pinned release, and what only reads the sources. Warnings are no errors here: an old release
# may call what newer releases of others have deprecated.
LOWER := .venv-lower
$(LOWER)/.stamp: $(VENV)/.dev .ci/lower_bounds.py $(INPUTS)
	rm -rf $(LOWER) && $(BIN)/python -m venv $(LOWER)
	$(BIN)/python .ci/lower_bounds.py > $(LOWER)/constraints.txt
	$(LOWER)/bin/python -m pip --disable-pip-version-check --no-input install --quiet \
		-c $(LOWER)/constraints.txt -e ".[langchain,openai,outlines,server]" \
		httpx hypothesis "langchain<1" pytest pytest-asyncio pytest-xdist sentencepiece
	@touch $@

.PHONY: test-lower
test-lower: $(LOWER)/.stamp
	$(LOWER)/bin/pytest -m "not slow" $(SPREAD) -k "not transformers" --ignore=tests/packaging \
		-p no:cacheprovider -o filterwarnings=default $(ARGS)

# Packages that import vllm, unmodified, on the stand-in for it. They bring much along that nothing
# else here needs: an environment of their own sees what the usual one has, too.
CONSUMERS := .venv-consumers
$(CONSUMERS)/.stamp: $(VENV)/.dev
	rm -rf $(CONSUMERS) && $(BIN)/python -m venv $(CONSUMERS)
	$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
		> "$$(echo $(CONSUMERS)/lib/python*/site-packages)/base.pth"
	$(CONSUMERS)/bin/python -m pip --disable-pip-version-check --no-input install --quiet \
		-c constraints.txt lm_eval distilabel llama-index-llms-vllm
	@touch $@

.PHONY: test-consumers
test-consumers: $(CONSUMERS)/.stamp
	$(CONSUMERS)/bin/python -P -m pytest tests/stand_in/test_vllm_consumers.py -p no:cacheprovider \
		--no-cov -n 0 $(ARGS)

# A library of its own, which the tests are pointed at; Python itself keeps what it allocates.
SANITIZED := build/sanitize
.PHONY: sanitize
sanitize: $(VENV)/.dev
	$(BIN)/python -m pip --disable-pip-version-check install --quiet setuptools
	QUIRE_SANITIZE=1 QUIRE_REQUIRE_NATIVE=1 $(BIN)/python setup.py --quiet build_ext \
		--build-lib $(SANITIZED) --build-temp $(SANITIZED)
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 HYPOTHESIS_PROFILE=fast \
	QUIRE_NATIVE_LIBRARY="$$(ls $(SANITIZED)/quire/kernels/cpu/_native.*)" \
		$(BIN)/pytest tests/kernels/test_native_product.py tests/kernels/test_native_attention.py \
			tests/kernels/test_native_lora.py tests/models/test_native_forward.py \
			tests/models/test_native_adapters.py tests/sampling/test_draws.py $(ARGS)

CHECK := build/native-check
.PHONY: native-check
native-check: $(VENV)/.dev
	$(BIN)/python tests/kernels/native/build.py $(CHECK)/check
	$(CHECK)/check $(ARGS)

.PHONY: native-check-arm64
native-check-arm64: $(VENV)/.dev
	@{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null || { \
		echo "this needs a compiler and an emulator for arm64:" \
		"on Debian and Ubuntu, install g++-aarch64-linux-gnu and qemu-user"; exit 1; }
	$(BIN)/python tests/kernels/native/build.py --static --compiler aarch64-linux-gnu-g++ \
		$(CHECK)/check-arm64
	qemu-aarch64 $(CHECK)/check-arm64 --quick $(ARGS)

# By PYTHON itself, whose torch is the one for the GPU, and not by the environment above.
.PHONY: gpu-check
gpu-check:
	"$(PYTHON)" tests/gpu/check.py $(ARGS)

.PHONY: wheel
wheel: $(VENV)/.dev
	rm -rf build dist
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

.PHONY: clean
clean:
	rm -rf $(VENV) $(LOWER) $(CONSUMERS) .types build dist *.egg-info .coverage .coverage.* .hypothesis \
		.import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	rm -f kernels/cpu/_native.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
