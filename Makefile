# `make demo` and `make test` need Python 3.10 or later with pip, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# The other family of packages that provide mmdet; both own the same folders.
OPENMMLAB_BIN := .venv-openmmlab/bin
OPENMMLAB_STAMP := .venv-openmmlab/.installed

.PHONY: demo test test-openmmlab test-sanitizers docs lint install clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py $(if $(QUICK),--quick) $(if $(OUT),--out $(OUT))

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

test-openmmlab: $(OPENMMLAB_STAMP)
	$(OPENMMLAB_BIN)/python -m mmbivit.doctor
	$(OPENMMLAB_BIN)/python -m pytest -n 2 --dist worksteal --durations=5 tests/test_families.py tests/test_detectors.py \
		tests/engine/test_resumable_training_hook.py tests/robustness/test_killed_runs.py \
		tests/apis/test_train_classifier.py tests/apis/test_predict.py

# The kernels in a copy of the tree, compiled so that the process ends at an access outside its memory or at undefined
# behaviour (gcc on Linux). To compile them takes minutes, so that CI does without.
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
SANITIZED_TESTS ?= tests/packed tests/deploy/test_plans.py tests/deploy/test_packed_swin.py tests/deploy/test_packed_vit.py \
	tests/deploy/test_packed_nest.py tests/deploy/test_packed_detectors.py
test-sanitizers: BIN_PATH = $(abspath $(BIN))
test-sanitizers: $(STAMP)
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -R LICENSE README.md configs mmbivit model-index.yml pyproject.toml setup.py tests tools $(SANITIZED)
	rm -f $(SANITIZED)/mmbivit/packed/_kernels*
	cd $(SANITIZED) && CFLAGS="$(SANITIZERS)" CXXFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
		$(BIN_PATH)/python setup.py --quiet build_ext --inplace --debug
	grep -q __asan_init $(SANITIZED)/mmbivit/packed/_kernels*
	cd $(SANITIZED) && export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" && \
		MMBIVIT_KERNELS=portable $(BIN_PATH)/python -c "from mmbivit.packed import kernels; print(*kernels.available_paths())" && \
		$(BIN_PATH)/python -m pytest --capture=sys -p no:cacheprovider $(SANITIZED_TESTS)

# The documentation site; a warning fails.
docs: $(STAMP)
	$(BIN)/python -m sphinx -b html -q -W --keep-going docs build/docs
	@echo "Open build/docs/index.html"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): EXTRAS := onedl,demo,dev,docs,benchmark,serve
$(OPENMMLAB_STAMP): EXTRAS := openmmlab,demo,dev
$(STAMP) $(OPENMMLAB_STAMP): setup.py pyproject.toml $(wildcard mmbivit/packed/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mmbivit needs Python 3.10 or later; name one with: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv .venv-openmmlab build *.egg-info
