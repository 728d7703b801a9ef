# Two commands for users: `make demo` and `make test`. Each makes its own virtual environment from pinned versions.

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
EXTRAS := [app,benchmarks,milvus,onnx,openvino,peft,serve,video,test]
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# setuptools warns that a clone comes first on the path, which is what an editable installation is for.
PIP := PYTHONWARNINGS="ignore:Editable installation" $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
# The common tests of transformers, which every model of that library has to pass. Only its source distribution has them.
COMMON_TESTS := $(VENV)/transformers-tests
# glibc hands large blocks back to the kernel at each free. Training on a CPU asks for them again at once: 8 % of its time.
export MALLOC_TRIM_THRESHOLD_ := -1
export MALLOC_MMAP_MAX_ := 0

.PHONY: demo test test-slow test-newest style clean

demo: $(VENV)/.installed-demo
	$(BIN)/cada demo

test: $(COMMON_TESTS)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(COMMON_TESTS)
	$(BIN)/python -m pytest -m slow

# The same with the newest versions that setup.cfg admits. Gradio wants an older Pillow than the base install, so the
# tests of the page are left out. torch stays: a newer one is a download of gigabytes.
test-newest:
	rm -rf .venv-newest
	printf 'torch==2.13.0\n' > .constraints-newest.txt
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=.constraints-newest.txt \
		EXTRAS=[benchmarks,milvus,onnx,openvino,peft,serve,video,test]

style: $(STAMP)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# The demo needs little; tests and benchmarks need every extra.
$(VENV)/.installed-demo: EXTRAS :=
$(VENV)/.installed-demo $(STAMP): $(CONSTRAINTS) setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install --constraint $(CONSTRAINTS) --editable ".$(EXTRAS)"
	touch $@

$(COMMON_TESTS): $(STAMP)
	rm -rf $@ $@.tmp && mkdir -p $@.tmp
	$(PIP) download --no-deps --no-binary transformers --dest $@.tmp \
		"transformers==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("transformers"))')"
	tar -xzf $@.tmp/transformers-*.tar.gz -C $@.tmp --strip-components 1 && rm $@.tmp/*.tar.gz && mv $@.tmp $@

clean:
	rm -rf .venv .venv-newest .constraints-newest.txt build *.egg-info .pytest_cache .ruff_cache .hypothesis
