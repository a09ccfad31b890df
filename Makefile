# `make demo` and `make test` need nothing but python3: they make .venv, install into it and do their job.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
HOST_REQUIREMENTS := $(VENV)/host-requirements.txt
CHECKOUTS := $(VENV)/host-checkouts
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

# Threads that spin while they wait make every other load on the machine many times slower.
export OMP_WAIT_POLICY ?= passive
# An empty environment has no PATH, and without one python3 cannot find itself.
export PATH ?= /usr/local/bin:/usr/bin:/bin

.PHONY: demo test smoke lint format host clean

demo: $(INSTALLED)
	$(BIN)/flexi demo

# A file's tests stay together, in one process of a thread each: what they share is made once. The tests in the host run in
# every checkout that there is, each with the packages that it asks for; where there is none they say so and are skipped. Those
# of the page share servers and a browser, and run in one process.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) --ignore tests/host --ignore tests/page
	tests/host/checkouts > $(CHECKOUTS)
	set -e; while read -r checkout <&3; do \
		echo "In $$checkout:"; \
		$(MAKE) --no-print-directory host CHECKOUT="$$checkout"; \
		OMP_NUM_THREADS=1 COMFYUI_PATH="$$checkout" $(BIN)/pytest $(PARALLEL) tests/host; \
		OMP_NUM_THREADS=1 COMFYUI_PATH="$$checkout" $(BIN)/pytest tests/page; \
	done 3< $(CHECKOUTS)
	if [ ! -s $(CHECKOUTS) ]; then $(BIN)/pytest -q -rs tests/host tests/page; fi

# Both doors, the nodes and the search, in one more version of the host: `make smoke CHECKOUT=~/ComfyUI-0.3.48`.
smoke: host
	OMP_NUM_THREADS=1 COMFYUI_PATH="$(CHECKOUT)" $(BIN)/pytest -m smoke tests/host

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# What a ComfyUI checkout (by default the oldest that is found) needs to be imported by tests/host: its own requirements without
# the CUDA-linked ones, and requests, which older ones import and do not ask for. Installed again when they change.
host: $(INSTALLED)
	@set -e; checkout="$(CHECKOUT)"; \
	if [ -z "$$checkout" ]; then checkout=$$(tests/host/checkouts | head -n 1); fi; \
	if [ -z "$$checkout" ]; then \
		echo "No ComfyUI checkout in \$$COMFYUI_PATH, ~/comfy or ../..: the host tests will be skipped."; \
		exit 0; \
	fi; \
	{ grep -viE '^(torch|torchvision|torchaudio|spandrel)([^a-z]|$$)' "$$checkout/requirements.txt"; echo; echo requests; } \
		> $(HOST_REQUIREMENTS).new; \
	if ! cmp -s $(HOST_REQUIREMENTS).new $(HOST_REQUIREMENTS); then \
		echo "Installing what the ComfyUI checkout $$checkout needs."; \
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
