# Needs only make and Python 3.11 or newer. `make help` lists what there is.

PYTHON ?= python3
PROMPT ?= a red circle moves left over a blue background
BIN := .venv/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

# Tests are many and small: a process a core, each with one thread, takes half the time of one process with all cores.
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Each check runs even if one before it failed, so that one call tells everything.
LINT = $(BIN)/ruff check . || failed=1; $(BIN)/ruff format --check . || failed=1; $(BIN)/mypy || failed=1

.PHONY: help install demo train-demo test lint clean
.DELETE_ON_ERROR:

install: .venv/installed

help:
	@echo "make          install swiftwan into .venv"
	@echo "make demo     and make demo.mp4 with the embedded model"
	@echo "make train-demo  and fine-tune a LoRA of it: train-demo/before.mp4 and after.mp4, minutes on two cores"
	@echo "make test     ruff, mypy and all tests"
	@echo "make lint     ruff and mypy only"
	@echo "make clean    remove .venv, demo.mp4 and every cache"

demo: .venv/installed
	$(BIN)/swiftwan generate "$(PROMPT)" --seed 7 --out demo.mp4

train-demo: .venv/installed-train
	$(BIN)/swiftwan train style-clips train-demo/clips
	$(BIN)/swiftwan train lora train-demo/clips --out train-demo/run --steps 200 --rank 4 --learning-rate 5e-3 \
		--timesteps uniform --shift 16 --drop-caption 0
	$(BIN)/swiftwan generate "$(PROMPT)" --seed 7 --guidance 1.5 --out train-demo/before.mp4
	$(BIN)/swiftwan generate "$(PROMPT)" --seed 7 --guidance 1.5 --out train-demo/after.mp4 \
		--with lora:train-demo/run/lora.safetensors

test: .venv/installed-dev
	@failed=0; $(LINT); $(TEST) || failed=1; exit $$failed

lint: .venv/installed-dev
	@failed=0; $(LINT); exit $$failed

clean:
	rm -rf .venv demo.mp4 train-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The files below are stamps: what they stand for is done, and is done again only when
# pyproject.toml or constraints.txt changes.
.venv/created:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: '$(PYTHON)' not found; swiftwan needs Python 3.11 or newer; try: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$($(PYTHON) --version) is too old; swiftwan needs Python 3.11 or newer; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/installed: .venv/created pyproject.toml constraints.txt
	@echo "Installing swiftwan into .venv (once; minutes, most of them PyTorch's download) ..."
	$(INSTALL) --editable .
	@touch $@

.venv/installed-train: .venv/created pyproject.toml constraints.txt
	@echo "Installing swiftwan and what training needs into .venv (once; minutes, most of them PyTorch's download) ..."
	$(INSTALL) --editable '.[train]'
	@touch $@ .venv/installed

.venv/installed-dev: .venv/created pyproject.toml constraints.txt requirements-page.txt
	@echo "Installing swiftwan and its test tools into .venv (once; minutes, most of them PyTorch's download) ..."
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps --requirement requirements-page.txt
	@touch $@ .venv/installed
