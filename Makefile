# `make demo` and `make test` need Python 3.10 or later with pip, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# The other family of packages that provide mmdet; both own the same folders.
OPENMMLAB_BIN := .venv-openmmlab/bin
OPENMMLAB_STAMP := .venv-openmmlab/.installed

.PHONY: demo test test-openmmlab lint install clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py $(if $(QUICK),--quick) $(if $(OUT),--out $(OUT))

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

test-openmmlab: $(OPENMMLAB_STAMP)
	$(OPENMMLAB_BIN)/python -m mmbivit.doctor
	$(OPENMMLAB_BIN)/python -m pytest -n 2 --dist worksteal --durations=5 tests/test_families.py tests/test_detectors.py \
		tests/engine/test_resumable_training_hook.py tests/robustness/test_killed_runs.py \
		tests/apis/test_train_classifier.py tests/apis/test_predict.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(STAMP)

$(STAMP): EXTRAS := onedl,demo,dev,benchmark
$(OPENMMLAB_STAMP): EXTRAS := openmmlab,demo,dev
$(STAMP) $(OPENMMLAB_STAMP): setup.py pyproject.toml $(wildcard mmbivit/packed/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mmbivit needs Python 3.10 or later; name one with: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv .venv-openmmlab build *.egg-info
