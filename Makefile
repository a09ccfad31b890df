# `make demo` and `make test` need nothing but python3: they make .venv, install into it and do their job.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
HOST_REQUIREMENTS := $(VENV)/host-requirements.txt

# Threads that spin while they wait make every other load on the machine many times slower.
export OMP_WAIT_POLICY ?= passive
# An empty environment has no PATH, and without one python3 cannot find itself.
export PATH ?= /usr/local/bin:/usr/bin:/bin

.PHONY: demo test lint format host clean

demo: $(INSTALLED)
	$(BIN)/flexi demo

# A file's tests stay together, in one process of a thread each: what they share is made once.
test: lint host
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# What a ComfyUI checkout needs to be imported by tests/host: its own requirements without the CUDA-linked ones, and
# requests, which it imports and does not ask for. Installed again when they change.
host: $(INSTALLED)
	@if [ -n "$$COMFYUI_PATH" ]; then set -- "$$COMFYUI_PATH"; else set -- ~/comfy/ComfyUI ../..; fi; \
	for checkout; do \
		if [ -f "$$checkout/comfy/samplers.py" ]; then found=$$checkout; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "No ComfyUI checkout in $$*: the host tests will be skipped. Set COMFYUI_PATH to one to run them."; \
		exit 0; \
	fi; \
	set -e; \
	{ grep -viE '^(torch|torchvision|torchaudio|spandrel)([^a-z]|$$)' "$$found/requirements.txt"; echo; echo requests; } \
		> $(HOST_REQUIREMENTS).new; \
	if ! cmp -s $(HOST_REQUIREMENTS).new $(HOST_REQUIREMENTS); then \
		echo "Installing what the ComfyUI checkout $$found needs."; \
		$(BIN)/pip install -q -c constraints.txt -r $(HOST_REQUIREMENTS).new; \
		mv $(HOST_REQUIREMENTS).new $(HOST_REQUIREMENTS); \
	fi

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[search,distributed,dev]'
	rm -f $(HOST_REQUIREMENTS)
	touch $@

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
