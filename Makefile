PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
FARM := $(VENV)/.linked
INTERPRETED := tests/kernels/interpreter
SOURCES := $(shell find core kernels plugins -name '*.py' -o -name '*.safetensors' -o -name '*.html' -o -name '*.yaml' | sort)

.PHONY: demo demo-full test test-all coverage interpreter lint types bench bench-kernels bench-pointcloud bench-audio bench-diffusion docs clean

demo: $(FARM)
	$(VENV)/bin/peft-suite demo --out runs/demo

demo-full: $(FARM)
	$(VENV)/bin/peft-suite demo --seeds 3 --out runs/demo

test: $(FARM) lint types interpreter
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "not slow" --ignore $(INTERPRETED)

# Counting lines takes a quarter of the time on top.
coverage: $(FARM)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "not slow" --ignore $(INTERPRETED) --cov --cov-report=term:skip-covered

test-all: $(FARM) lint types interpreter
	OMP_NUM_THREADS=1 PEFT_SUITE_TEST_ALL=1 $(PY) -m pytest -n 2 --dist worksteal --ignore $(INTERPRETED)

# Triton decides at its first import whether kernels are interpreted: these tests have a process of their own.
interpreter: $(FARM)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -q $(INTERPRETED)

lint: $(FARM)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(FARM)
	$(VENV)/bin/mypy -p peft_suite

bench: $(FARM)
	OMP_NUM_THREADS=1 $(PY) benchmarks/core/run.py

bench-kernels: $(FARM)
	$(PY) benchmarks/kernels/run.py

bench-pointcloud: $(FARM)
	$(PY) benchmarks/pointcloud/geometry.py
	$(PY) benchmarks/pointcloud/steps.py
	$(PY) benchmarks/pointcloud/loading.py

bench-audio: $(FARM)
	$(PY) benchmarks/audio/frontend.py
	$(PY) benchmarks/audio/steps.py
	$(PY) benchmarks/audio/loading.py

bench-diffusion: $(FARM)
	$(PY) benchmarks/diffusion/stack.py
	$(PY) benchmarks/diffusion/memory.py

docs: $(FARM)
	$(VENV)/bin/mkdocs build -q

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt 'setuptools>=77' wheel
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]' --config-settings editable_mode=strict
	touch $@

# A strict editable install links every file by name: link again when files come or go.
# Numba's cache does not see that an imported file changed: compile again.
$(FARM): $(STAMP) $(SOURCES)
	rm -rf build
	find kernels -name '*.nbi' -delete -o -name '*.nbc' -delete
	$(PY) -m pip install -q --no-deps --no-build-isolation -e . --config-settings editable_mode=strict
	touch $@

clean:
	rm -rf $(VENV) build dist runs site *.egg-info
