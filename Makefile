# `make demo` and `make test` need nothing but python3: they make .venv, install into it and do their job.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
HOST_REQUIREMENTS := $(VENV)/host-requirements
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

# Threads that spin while they wait make every other load on the machine many times slower.
export OMP_WAIT_POLICY ?= passive
# An empty environment has no PATH, and without one python3 cannot find itself.
export PATH ?= /usr/local/bin:/usr/bin:/bin

.PHONY: demo test lint format host clean

demo: $(INSTALLED)
	$(BIN)/flexi demo

# A file's tests stay together, in one process of a thread each: what they share is made once. The tests in the host run in
# every checkout that there is; where there is none they say so and are skipped.
test: lint host
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) --ignore tests/host
	found=0; while read -r checkout; do \
		found=1; echo "In $$checkout:"; \
		OMP_NUM_THREADS=1 COMFYUI_PATH=$$checkout $(BIN)/pytest $(PARALLEL) tests/host || exit; \
	done < <(tests/host/checkouts); \
	if [ $$found = 0 ]; then $(BIN)/pytest -q tests/host; fi

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# What the ComfyUI checkouts need to be imported by tests/host: their own requirements without the CUDA-linked ones, and
# requests, which older ones import and do not ask for. Installed again when they change; the newest version's last.
host: $(INSTALLED)
	@set -e -o pipefail; \
	tests/host/checkouts > $(HOST_REQUIREMENTS).checkouts; \
	if [ ! -s $(HOST_REQUIREMENTS).checkouts ]; then \
		echo "No ComfyUI checkout in \$$COMFYUI_PATH, ~/comfy or ../..: the host tests will be skipped."; \
	fi; \
	number=0; while read -r checkout; do \
		number=$$((number + 1)); listed=$(HOST_REQUIREMENTS).$$number; \
		{ grep -viE '^(torch|torchvision|torchaudio|spandrel)([^a-z]|$$)' "$$checkout/requirements.txt"; echo; echo requests; } \
			> $$listed.new; \
		if ! cmp -s $$listed.new $$listed; then \
			echo "Installing what the ComfyUI checkout $$checkout needs."; \
			$(BIN)/pip install -q -c constraints.txt -r $$listed.new; \
			mv $$listed.new $$listed; \
		fi; \
	done < $(HOST_REQUIREMENTS).checkouts

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[search,distributed,dev]'
	rm -f $(HOST_REQUIREMENTS).*
	touch $@

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
