# make demo: train the offline quickstart.   make test: lint and tests.   Both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test install lint clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing packages (a few GB the first time)"
	@# uv resolves and unpacks in seconds; pip does the same more slowly where uv has no build
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null || true
	@if [ -x $(BIN)/uv ]; then \
		$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'; \
	else \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'; \
	fi
	@touch $@

# The demo owns runs/demo and makes it anew each time; no other run is touched.
demo: install
	rm -rf runs/demo
	$(BIN)/python -m distill.run quickstart --output runs/demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf .venv runs *.egg-info .pytest_cache .ruff_cache
