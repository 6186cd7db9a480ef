# `make demo` and `make test` set everything up on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-cuda lint bench soak attack clean help

help:
	@echo "make demo       four nodes fine-tune one model on this machine (about a minute)"
	@echo "make test       format, types, layer contracts and all tests"
	@echo "make lint       the first three alone"
	@echo "make test-cuda  the tests of a GPU, on a machine that has one"
	@echo "make soak       kills, stops and joins at random for 5 minutes; HOURS=8 for the long form"
	@echo "make attack     strangers and liars against a coordinator, floods in full size"
	@echo "make bench      the committed benchmarks, again, into docs/results"

demo: $(READY)
	$(BIN)/zo-node demo --output demo-out

test: lint
	$(BIN)/python -m pytest -n 4 --dist worksteal

# Processes are started anew there: CUDA does not survive a fork.
test-cuda: $(READY)
	ZO_TEST_CUDA=1 ZO_TEST_EXEC=1 $(BIN)/python -m pytest -m cuda

soak: $(READY)
	$(BIN)/python -m benchmarks.soak $(if $(HOURS),--hours $(HOURS))

attack: $(READY)
	ZO_ATTACK_FULL=1 $(BIN)/python -m pytest -m attack
	$(BIN)/python -m benchmarks.attacks --out docs/results

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m benchmarks.kernels --out docs/results
	$(BIN)/python -m benchmarks.round --out docs/results
	$(BIN)/python -m benchmarks.probing --out docs/results
	$(BIN)/python -m benchmarks.join --out docs/results

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-out
