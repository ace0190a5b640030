# Every target builds the environment it needs, once, outside the clone (tools/environment.py).
# NPU_FUSION_PYTHON=... uses an existing environment instead; JOBS=n runs the tests in n processes, by pytest-xdist
# (1: in this one).

RUN := tools/run
JOBS ?= $(if $(NPU_FUSION_PYTHON),1,2)
PYTEST_ARGS ?=

CARRY_PYTEST := \
	"This Python has no pytest. On a machine with a network: pip download --only-binary :all: --dest build/wheels pytest" \
	"then carry build/wheels here and: $${NPU_FUSION_PYTHON:-python3} -m pip install --no-index --find-links build/wheels --target build/site pytest" \
	"then: PYTHONPATH=build/site make gpu-test"

export OMP_NUM_THREADS ?= 1

.PHONY: help demo test environments lint format types unit gpu-test coverage bench launches kernels

help:
	@echo "make demo      compile two real models, show what fused, check against eager"
	@echo "make test      lint, types and all tests that this machine can run"
	@echo "make lint | types | unit | format | gpu-test | coverage | bench | launches | kernels"

demo:
	$(RUN) examples/demo.py

test: environments lint types unit

# All at once: what one waits for on a disk another may compute.
environments:
	@$${PYTHON:-python3} tools/environment.py main npu ascend >/dev/null

lint:
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format:
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types:
	$(RUN) -m mypy

# Torch, hypothesis and others are stricter where CI is set; what CI would refuse is to be refused here.
unit: export CI ?= 1
unit:
	$(RUN) -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadgroup --no-loadscope-reorder) $(PYTEST_ARGS)

# Needs nothing but torch, triton and pytest beside the clone, so that it runs where nothing can be installed. NPU_FUSION_PYTHON defaults to
# the machine's own python3.
gpu-test: export NPU_FUSION_PYTHON ?= python3
gpu-test:
	@$(RUN) -c 'import pytest' || { printf '%s\n' $(CARRY_PYTEST) >&2; exit 1; }
	$(RUN) -m pytest -m gpu $(PYTEST_ARGS)

coverage:
	$(RUN) benchmarks/coverage.py
	$(RUN) benchmarks/coverage.py --suite routed
	$(RUN) benchmarks/coverage.py --suite quantised

bench:
	$(RUN) benchmarks/matching.py

# On the virtual NPU, in the environment that has torch_npu (tools/environment.py npu).
launches:
	$(RUN) benchmarks/launches.py

# By the compiler in the environment that has triton-ascend (tools/environment.py ascend).
kernels:
	$(RUN) -m tests.ascend_gate.table docs/kernels.md
