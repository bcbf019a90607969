# Two commands: `make demo` and `make test`. Each sets everything up in .venv first.
PYTHON ?= python3
VENV   ?= .venv
# On Linux plain `torch` from PyPI is the CUDA build. TORCH chooses another.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
PY     := $(BIN)/python
STAMP  := $(VENV)/.ready
SOURCES := $(shell find csrc -type f 2>/dev/null)
NATIVE  := $(shell find csrc tests/cuda_host -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# CI has little time: three architectures of five. Tests read registers and spills of what is built.
ifdef CI
export CAMKERNELS_CUDA_ARCHS ?= 80;90;120
endif

.PHONY: demo test test-slow lint format types doctor bench docs gpu clean

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -qq --upgrade pip
	$(PY) -m pip install -qq "$(TORCH)" numpy
	touch $@

$(STAMP): $(VENV)/.torch setup.py pyproject.toml $(SOURCES)
	$(PY) -m pip install -qq --editable ".[train]"
	touch $@

# torchvision and timm give the tests real networks, grad-cam maps to compare with, accelerate a
# trainer; without their dependencies, which would replace a CPU build of torch.
$(VENV)/.tests: $(VENV)/.torch setup.py pyproject.toml $(SOURCES)
	$(PY) -m pip install -qq --editable ".[train,dev,triton]"
	$(PY) -m pip install -qq --no-deps torchvision==0.28.0 timm grad-cam==1.5.7 torchcam==0.5.0 ttach opencv-python-headless accelerate psutil
	touch $(STAMP) $@

# The tests' torchvision, if `make test` put it here, imports beside a CPU torch with their help only.
demo: $(STAMP)
	PYTHONPATH=$(if $(wildcard $(VENV)/.tests),tests/_sitecustomize) $(BIN)/camtrain demo

doctor: $(STAMP)
	$(PY) -m camkernels.doctor

lint: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

types: $(VENV)/.tests
	$(BIN)/mypy

format: $(VENV)/.tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# The .cu files built for the host run the same tests as every other backend.
CUDA_TESTS := $(addprefix tests/ops/test_,$(addsuffix .py,relu cam map_statistics cam_statistics ssim ssim_kernels warped_ssim))
# Processes that share the tests, a thread each: threads that wait for a core cost more than they do.
# Tests of threads ask for them, and wait without spinning.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(WORKERS) --dist worksteal --durations=60 --durations-min=2
# The interpreter is chosen when Triton is imported, hence a process of its own.
test: lint types
	CAMKERNELS_REQUIRE=cpu $(PYTEST) tests -m "not slow and not gpu"
	TRITON_INTERPRET=1 CAMKERNELS_REQUIRE=triton $(PYTEST) tests/ops -m "not slow and not gpu"
	CAMKERNELS_CUDA_HOST=1 CAMKERNELS_REQUIRE=cuda $(PYTEST) tests/cuda_host $(CUDA_TESTS) -m "not slow and not gpu"

test-slow: $(VENV)/.tests
	CAMKERNELS_REQUIRE=cpu $(PYTEST) tests -m "slow and not gpu"
	TRITON_INTERPRET=1 CAMKERNELS_REQUIRE=triton $(PYTEST) tests/ops -m "slow and not gpu"
	CAMKERNELS_CUDA_HOST=1 CAMKERNELS_REQUIRE=cuda $(PYTEST) tests/cuda_host $(CUDA_TESTS) -m "slow and not gpu"

bench: $(VENV)/.tests
	$(PY) -m benchmarks run all --device cpu

# The site, into build/docs. It is made of the source, which is not imported.
$(VENV)/.docs: $(STAMP)
	$(PY) -m pip install -qq --editable ".[docs]"
	touch $@

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --quiet

# In a Python with a CUDA build of torch, set up already: nothing is installed but the kernels, no
# network is needed. Goes on where it was; ARGS="--list", "--stage bench-", "--budget 540".
.PHONY: gpu
GPU_PYTHON ?= $(if $(wildcard $(PY)),$(PY),$(PYTHON))
gpu:
	@$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info camkernels/*.so
