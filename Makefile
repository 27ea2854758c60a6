# make demo   paint the bundled pictures with the shipped models, cut channels out and paint again (CPU, minutes)
# make test   run all tests
# make test-numeric  run the tests that compare computed numbers again, with the instructions of the oldest processors
# make test-browser  run the tests of the page for the browser (needs Node.js and Chromium)
# make lint   check the code with ruff (settings: pyproject.toml)
# make clean  remove what the others made

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --quiet

PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q --numprocesses auto --dist worksteal
NUMERIC := tests/test_network.py tests/test_loss.py tests/test_model_store.py tests/painting/test_stylizer.py \
	tests/training/test_step.py tests/training/test_muon.py tests/pruning \
	tests/exporting/test_export.py

.PHONY: demo test test-numeric test-browser lint clean

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is too old, Python 3.10 or newer is needed (make PYTHON=python3.11 ...)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.requirements $(VENV)/.requirements-dev: $(VENV)/.%: %.txt pyproject.toml $(VENV)/.made
	@echo "installing $< into $(VENV) (torch is large: a few minutes)"
	$(PIP) -r $<
	@touch $@

demo: $(VENV)/.requirements
	PYTHON=$(RUN) bash demo.sh

test: $(VENV)/.requirements-dev
	$(PYTEST) tests

test-numeric: $(VENV)/.requirements-dev
	ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default $(PYTEST) $(NUMERIC)

exporting/page/node_modules/.made: exporting/page/package.json
	npm install --prefix exporting/page --no-package-lock --no-audit --no-fund --loglevel error
	@touch $@

test-browser: $(VENV)/.requirements-dev exporting/page/node_modules/.made
	PYTHON=$(abspath $(RUN)) node --test exporting/page/test/page.test.mjs

lint: $(VENV)/.requirements-dev
	$(RUN) -m ruff check .

clean:
	rm -rf $(VENV) exporting/page/node_modules demo build *.egg-info
