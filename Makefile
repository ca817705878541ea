# `make help` lists the targets. Every target makes what it needs, the virtual environment included.

PYTHON ?= python3
VENV ?= .venv
# Installed before everything else, so that nothing pulls in another build. On Linux, PyPI's torch brings several GB of CUDA
# libraries, which nothing here needs. What to give instead:
#   the CPU build, from PyTorch's index    make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
#   the newest, for a CUDA GPU             make test TORCH=torch
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

MODEL ?= fashion-sd
# The plans that were learned for the model, what needs no learning, and diffusers' own.
SCHEDULERS ?= Plan(plan='$(MODEL)'),DPMSolver(grid=karras),UniPC(solver_order=3),diffusers:DPMSolverMultistepScheduler,diffusers:UniPCMultistepScheduler,diffusers:DDIMScheduler
STEPS ?= 5,8,10,20
SAMPLES ?= 500
# Each image is held against what many steps make of its seed: FID sees the set, this the image.
FIDELITY ?= DPMSolver(solver_order=3, grid=karras)@50
# At 4 the FID of these small images is that of guidance (2.8 at 50 steps, 0.5 at 2), which hides what steps cost.
GUIDANCE ?= 2
# At most so many images a cell, to try it out: make demo LIMIT=8
LIMIT ?=
OUT ?= out/demo

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format train clean distclean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

# The stamp: installed once, and again when what is to be installed changes. An interrupted install is taken up again.
$(STAMP): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@

install: $(STAMP)  ## Make the virtual environment and install fewstep into it, editable, with the developers' tools.

demo: $(STAMP)  ## Sweep our schedulers and diffusers' on the embedded model and write a report (LIMIT=8 to try it out).
	$(BIN)/fewstep sweep --model "$(MODEL)" --schedulers "$(SCHEDULERS)" --steps "$(STEPS)" --samples $(SAMPLES) \
		--guidance $(GUIDANCE) --fidelity "$(FIDELITY)" $(if $(LIMIT),--limit $(LIMIT)) --out "$(OUT)"
	@echo "The report, one page to open in a browser:"
	@$(BIN)/fewstep report "$(OUT)"

test: $(STAMP)  ## Run the tests.
	$(BIN)/python -m pytest

lint: $(STAMP)  ## ruff, mypy --strict and pyright.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p fewstep
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)  ## Let ruff sort imports and format.
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# Each run goes on from its last checkpoint. What the weights that ship were given stands in their cards.
ZOO := $(BIN)/python -m fewstep.pipelines.zoo.training

train: $(STAMP)  ## Retrain the embedded models (needs the Debian package dataset-fashion-mnist; hours on two cores).
	$(ZOO) fashion-features --steps 5000
	$(ZOO) export fashion-features
	$(ZOO) fashion-autoencoder --minutes 21
	$(ZOO) export fashion-autoencoder
	$(ZOO) fashion-clip --minutes 14
	$(ZOO) export fashion-clip
	$(ZOO) fashion-sd --minutes 66
	$(ZOO) export fashion-sd
	$(ZOO) measure fashion-sd
	$(ZOO) fashion-dit --minutes 48 --threads 1
	$(ZOO) export fashion-dit
	$(ZOO) measure fashion-dit
	$(ZOO) fashion-dit-small --minutes 13 --threads 1
	$(ZOO) export fashion-dit-small
	$(ZOO) measure fashion-dit-small
	$(ZOO) fashion-flow --minutes 48 --threads 1
	$(ZOO) export fashion-flow
	$(ZOO) measure fashion-flow
	$(ZOO) fashion-pixel --minutes 60 --threads 1
	$(ZOO) export fashion-pixel
	$(ZOO) measure fashion-pixel

clean:  ## Remove builds and tools' caches; environment, results and training checkpoints stay.
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean  ## Remove the virtual environment and the demo's results too.
	rm -rf "$(VENV)" out
