# make demo   install, then train a network in a federation of ten clients without a backward pass
# make test   install, then lint, type-check and test
# make bench  install, then measure the engine against its yardsticks (a quarter of an hour);
#             bench-check says which ratios fall short of their aims, scale draws the curves,
#             secagg measures what secure sums cost, traffic counts the bytes of rounds,
#             bench-memory the memory of whole processes
# make test-deploy  start Flower and FLARE on this machine and test through them (test-slice: a part)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-deploy test-slice lint format bench bench-check scale secagg traffic deployment bench-memory clean

.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[torch,fast,plots,images]'
	touch $@

.venv/.dev: .venv/.demo
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv/.deploy: .venv/.dev
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[flower,flare]'
	touch $@

.venv/.bench: .venv/.demo
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[onnx,secure]'
	touch $@

demo: .venv/.demo
	$(BIN)/python benchmarks/demo.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# Real Flower and FLARE processes on this machine; test-slice is the short part that CI runs.
test-deploy: .venv/.deploy
	$(BIN)/python -m pytest tests/deploy

test-slice: .venv/.deploy
	$(BIN)/python -m pytest tests/deploy -m slice

bench: .venv/.bench
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/report.py

bench-check: .venv/.bench
	$(BIN)/python benchmarks/bench.py --read --check

scale: .venv/.bench
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/report.py

secagg: .venv/.bench
	$(BIN)/python benchmarks/secagg.py
	$(BIN)/python benchmarks/report.py

traffic: .venv/.bench
	$(BIN)/python benchmarks/traffic.py
	$(BIN)/python benchmarks/report.py

deployment: .venv/.deploy
	$(BIN)/python benchmarks/deployment.py
	$(BIN)/python benchmarks/report.py

bench-memory: .venv/.bench
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python experiments/table4/run.py
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
