# `make demo` and `make test` need Python 3.10 or later with pip, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint install clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py $(if $(QUICK),--quick) $(if $(OUT),--out $(OUT))

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=10

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(STAMP)

$(STAMP): setup.py pyproject.toml $(wildcard mmbivit/deploy/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mmbivit needs Python 3.10 or later; name one with: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[onedl,demo,dev,benchmark]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
