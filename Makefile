# make demo: distil the offline quickstart, score it, export it, serve it.   make demo PRECISION=int8: an int8 bundle.
# make test: lint and tests.   make check: lint and the quick ones.   make test-all: further seeds and combinations too.
# All install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WANTED := --constraint constraints.txt --editable '.[dev]'

.PHONY: demo check test test-all lint install clean

install: .venv/installed

# Remade when what is installed changes. An environment without a working pip is one that was left half-made.
.venv/installed: pyproject.toml constraints.txt
	@$(PIP) --version >/dev/null 2>&1 || { \
		command -v $(PYTHON) >/dev/null || { \
			echo "error: no $(PYTHON) on PATH: install Python 3.11 or 3.12, or name one: make PYTHON=python3.12" >&2; \
			exit 2; }; \
		$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { \
			echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), 3.11 or 3.12 is needed (constraints.txt, the embedded Triton): make PYTHON=python3.12" >&2; \
			exit 2; }; \
		echo "making .venv with $$($(PYTHON) -V)"; \
		$(PYTHON) -m venv .venv || { \
			echo "error: $(PYTHON) cannot make environments (on Debian and Ubuntu: apt install python3-venv)" >&2; \
			exit 2; }; \
	}
	@echo "installing into .venv (the first time a few GB: a minute with uv, some minutes with pip)"
	@# uv is many times faster; pip is there for machines without uv, or whose index is set up for pip only. Compiled here,
	@# as pip does: otherwise every process compiles torch and timm again where PYTHONDONTWRITEBYTECODE is set
	@if $(PIP) install --quiet uv 2>/dev/null && \
		$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $(WANTED); then :; \
	else echo "uv does not work here, going on with pip"; $(PIP) install $(WANTED); fi
	@touch $@

# Every demo is a run folder of its own (runs/quickstart, runs/quickstart-2, …): nothing is ever deleted. Its heads are
# trained and its scores taken on drawn scenes, because labelled photographs cannot be had offline.
SCENES := --train 160 --val 60 --size 112
SCORING := --tasks knn,segmentation,depth --with-teachers dense.size=112 dense.steps=200 dense.lr=1e-2
# TensorRT-RTX builds engines for GPUs that are not here: GeForce RTX 30, 40 and 50
EXPORT := --formats onnx,tensorrt-rtx --compute-capability 8.6 8.9 12.0
# make demo PRECISION=int8: of the bundle, fp32, fp16, bf16 or int8 (which is calibrated on the packaged photographs)
PRECISION ?= fp32
PRECISE := --precision $(PRECISION) $(if $(filter int8,$(PRECISION)),--calibration packaged-photos)
# Zero-shot classes, from the rows of the classification teacher's own classifier: no CLIP can be had offline
LABELS := 'Egyptian cat' tabby 'golden retriever' espresso 'space shuttle' missile 'wall clock' 'coral reef'
# A photograph that scikit-image brings along
PHOTO := $(BIN)/python -c 'import skimage.data; print(skimage.data.__path__[0])'
demo: install
	@run=runs/quickstart; n=2; while [ -e $$run ]; do run=runs/quickstart-$$n; n=$$((n + 1)); done; \
	set -e; \
	show() { echo "$$@"; "$$@"; }; \
	show $(BIN)/python -m distill.run --output $$run; \
	test -e $$run/student.safetensors || { echo "stopped: finish $$run with the command above, or start again: make demo" >&2; exit 1; }; \
	show $(BIN)/python -m distill.scenes --output $$run/scenes $(SCENES); \
	show $(BIN)/python -m distill.evaluate $$run --data $$run/scenes $(SCORING); \
	show $(BIN)/python -m export.run $$run --output $$run/bundle $(PRECISE) $(EXPORT); \
	printf '%s\n' $(LABELS) > $$run/labels.txt; \
	show $(BIN)/python -m export.text --output $$run/bundle --classifier cls --run $$run --labels $$run/labels.txt; \
	show $(BIN)/python -m serve.trial $$run/bundle "$$($(PHOTO))/chelsea.png" --output $$run/answers; \
	echo "(segmentation and depth were learnt from 160 drawings: expect little of them on photographs; the classes are"; \
	echo "MobileNetV2's, eight of its thousand, not a CLIP's)"; \
	echo "(python is $(BIN)/python; \". $(BIN)/activate\" makes it so)"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Three processes: a fifth of the suite waits for servers. Files go to them whole and in order, so that the fixtures of a
# file are made once; those of all files are made once for all (tests/conftest.py, `made_once`).
PYTEST := $(BIN)/python -m pytest -q --numprocesses 3 --dist loadfile --no-loadscope-reorder

check: lint
	$(PYTEST) -m 'not slow'

test: lint
	$(PYTEST)

# with further seeds and combinations, and wandb
test-all: lint
	$(PIP) install --quiet --constraint constraints.txt wandb
	$(PYTEST) -m ''

# The environment and caches; runs/ holds trained models and stays.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find contract distill export serve tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
