# Needs only Python >= 3.11, pip and make. Every target makes .venv when it is missing; a second call installs nothing.
#   make run     train, hand off and chat with a small reasoning model (recipes/first.toml); RECIPE=... ARGS=... to change
#   make engines other serving engines, each in an environment of its own under .engines (ENGINES=... for some of them)
#   make test    the tests that need no other engine and no accelerator, without the slow ones; WORKERS=1 for one by one
# PYTHON=... chooses the interpreter, TORCH_INSTALL="..." another torch than the set-up would take (scripts/make_venv.py).

PYTHON ?= python3
RECIPE ?= recipes/first.toml
ARGS ?=
ENGINES ?=
WORKERS ?= auto
BIN := .venv/bin
BENCHMARKS := benchmarks/train_step.py benchmarks/generate.py
export TORCH_INSTALL

.PHONY: run engines test test-slow bench bench-qualify bench-drill bench-handoff bench-serve lint format clean venv-run venv-dev

run: venv-run
	$(BIN)/crosschip run $(RECIPE) $(ARGS)

engines:
	@$(PYTHON) scripts/make_engines.py $(ENGINES)

test: venv-dev
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --durations 40 -m "not slow and not engines and not gpu" $(ARGS)

test-slow: venv-dev
	$(BIN)/python -m pytest -m "slow or engines or gpu" $(ARGS)

bench: venv-run
	set -e; for benchmark in $(BENCHMARKS); do $(BIN)/python $$benchmark $(ARGS); done

bench-qualify: venv-run
	$(BIN)/python benchmarks/qualify.py $(ARGS)

bench-drill: venv-run
	$(BIN)/python benchmarks/drill.py $(ARGS)

bench-handoff: venv-run
	$(BIN)/python benchmarks/handoff.py $(ARGS)

bench-serve: venv-run
	$(BIN)/python benchmarks/serve.py $(ARGS)

lint: venv-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv.lock build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv.*' -prune -exec rm -rf {} +

venv-run:
	@$(PYTHON) scripts/make_venv.py run

venv-dev:
	@$(PYTHON) scripts/make_venv.py dev
