VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
BENCH_STAMP := $(VENV)/.installed-bench
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
LOGGERS := .venv-loggers
LOGGERS_STAMP := $(LOGGERS)/.installed
# installs into the environment of a Python: uv does it in less time, where there is one
ifeq ($(shell command -v uv),)
install_into = $(1) -m pip install --quiet --disable-pip-version-check
else
install_into = uv pip install --quiet --python $(1)
endif

.PHONY: install demo test test-fast test-oldest test-loggers browser-test wheel-test
.PHONY: check docs guide strategies scaling faults casebook zoo treatment-bench evidence evidence-quick third-party bench bench-gpu

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(call install_into,$(BIN)/python) -c constraints.txt -e ".[dev]"
	touch $(DEMO_STAMP) $(STAMP)

# The package alone, without what its tests and documentation need
$(DEMO_STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(call install_into,$(BIN)/python) -c constraints.txt -e .
	touch $(DEMO_STAMP)

demo: $(DEMO_STAMP)
	$(BIN)/lightning-gradguard demo

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

test-fast: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow"

# Lightning and the other dependencies, as old as pyproject.toml allows
$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || python3 -m venv $(OLDEST)
	$(call install_into,$(OLDEST)/bin/python) -c constraints-oldest.txt -e ".[dev]"
	touch $(OLDEST_STAMP)

test-oldest: $(OLDEST_STAMP)
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -q

$(LOGGERS_STAMP): pyproject.toml constraints.txt
	test -x $(LOGGERS)/bin/python || python3 -m venv $(LOGGERS)
	$(call install_into,$(LOGGERS)/bin/python) -c constraints.txt -e ".[dev,loggers]"
	touch $(LOGGERS_STAMP)

test-loggers: $(LOGGERS_STAMP)
	$(LOGGERS)/bin/python -m pytest -q tests/runtime/logging/test_loggers.py tests/contracts/test_console_messages.py

# The wheel, installed alone in an empty environment and run outside of the clone
wheel-test:
	rm -rf build/wheel
	python3 -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel .
	! build/wheel/venv/bin/python -m zipfile -l build/wheel/*.whl | grep ruff.toml
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build/wheel/*.whl
	cd build/wheel && venv/bin/python -m pip check && venv/bin/lightning-gradguard --version
	cd build/wheel && venv/bin/lightning-gradguard demo && venv/bin/lightning-gradguard report runs --html
	test -s build/wheel/report.html
	cd build/wheel && venv/bin/python -c "import importlib.metadata as m, re; \
		assert not re.search(r'\]\((?!https?:|#)', m.metadata('lightning-gradguard').get_payload())"

# TensorBoard in a real browser; its pictures are those of the documentation
browser-test: install
	command -v chromium >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium; }
	$(call install_into,$(BIN)/python) -c constraints.txt -e ".[dev,browser]"
	$(BIN)/python -m pytest -q tests/browser --pictures docs/images

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: install
	$(BIN)/python -m mkdocs build --strict

guide: install
	$(BIN)/python -m docs.generators.guide

strategies: install
	$(BIN)/python -m pytest -q tests/contracts/strategies --write-strategies

scaling: install
	$(BIN)/python -m docs.generators.scaling

casebook: install
	$(BIN)/python -m benchmarks.casebook

treatment-bench: install
	$(BIN)/python -m benchmarks.treatment --casebook

faults: install
	$(BIN)/python -m benchmarks.faults

zoo: install
	$(BIN)/python -m benchmarks.zoo.truth
	$(BIN)/python -m benchmarks.zoo

evidence: install
	$(BIN)/python -m benchmarks.evidence

third-party: install
	$(BIN)/python -m benchmarks.third_party

evidence-quick: install
	$(BIN)/python -m benchmarks.evidence --quick

# The packages that the suite is compared with
$(BENCH_STAMP): $(STAMP)
	$(call install_into,$(BIN)/python) -c constraints.txt -e ".[dev,bench]"
	touch $(BENCH_STAMP)

bench: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks.cost

bench-gpu: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks.cost --gpu
