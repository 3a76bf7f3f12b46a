PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
# Three on two processors, for some tests wait; about 1.5 GB each.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(max(3, min(8, os.cpu_count() or 1)))")

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench lint clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: python3 is too old: make PYTHON=/path/to/python3.11 (or newer)")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[trainer,rewards,test]'
	@touch $(READY)

demo: $(READY)  ## Align the bundled tiny flow model on any machine, in a few minutes: runs/demo
	$(RUN)/g2rpo train recipes/demo_awm.yaml --out runs/demo --replace

test: $(READY)  ## Run the tests but the longest, with ComfyUI's where one is found
	$(RUN)/python -m pytest -n $(WORKERS) --dist loadgroup

test-all: $(READY)  ## Every test and every case in every ComfyUI, also in a browser, and the coverage gate
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt playwright
	G2RPO_EVERY_COMFYUI=1 G2RPO_ALL_CASES=1 $(RUN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "" --cov=comfy_g2rpo --cov-fail-under=95

bench: $(READY)  ## Measure rollout speed, credit assignment and scoring, short forms
	$(RUN)/python benchmarks/rollout.py --quick
	$(RUN)/python benchmarks/credit.py --quick
	$(RUN)/python benchmarks/scoring.py --quick

lint: $(READY)  ## Check style with ruff
	$(RUN)/ruff check .

clean:  ## Remove the virtual environment, build products and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .coverage htmlcov .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
