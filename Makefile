# Two commands for users: `make demo` and `make test`. Each makes its own .venv from pinned versions.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# The common tests of transformers, which every model of that library has to pass. Only its source distribution has them.
COMMON_TESTS := .venv/transformers-tests
# glibc hands large blocks back to the kernel at each free. Training on a CPU asks for them again at once: 8 % of its time.
export MALLOC_TRIM_THRESHOLD_ := -1
export MALLOC_MMAP_MAX_ := 0

.PHONY: demo test test-slow style clean

demo: .venv/.installed-demo
	$(BIN)/cada demo

test: $(COMMON_TESTS)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(COMMON_TESTS)
	$(BIN)/python -m pytest -m slow

style: $(STAMP)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# The demo needs little; tests and benchmarks need every extra.
.venv/.installed-demo: EXTRAS :=
$(STAMP): EXTRAS := [app,benchmarks,milvus,onnx,test]
.venv/.installed-demo $(STAMP): constraints.txt setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".$(EXTRAS)"
	touch $@

$(COMMON_TESTS): $(STAMP)
	rm -rf $@ $@.tmp && mkdir -p $@.tmp
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --dest $@.tmp \
		"$$(grep '^transformers==' constraints.txt)"
	tar -xzf $@.tmp/transformers-*.tar.gz -C $@.tmp --strip-components 1 && rm $@.tmp/*.tar.gz && mv $@.tmp $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
