# make demo   sets everything up and shows FDCR defending (or failing to defend) a small federation
# make test   sets everything up and runs the tests
# make quick  the same for a part of them that looks at everything once, in under two minutes
# make test-integrations   the same for Flower, NVFlare and ByzFL, and for TensorBoard, Weights & Biases and MLflow
# make docs   builds the documentation in build/site, with its two notebooks executed
# make wheel  builds a wheel for every Python in build/wheels; make wheel-test tries it in empty environments
# All need only Python >= 3.10 with venv; a C++17 compiler makes the kernels fast. `make CPU=1 test` takes the PyTorch
# without CUDA, a tenth of the download.
PYTHON ?= python3
CPU ?=
TORCH ?= torch torchvision
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
SEEDS ?= 1
BENCH ?= benchmarks
# The tests compile the CUDA kernels themselves, and nothing here has a GPU to run them on: FORCE_CUDA=1 builds them.
export FORCE_CUDA ?= 0

.PHONY: demo test quick test-integrations docs wheel wheel-test sanitize bench bench-compare lint lint-python lint-types lint-cpp format clean

demo: $(VENV)/installed
	rm -rf $(OUT)
	$(BIN)/fdcr-fast demo --out $(OUT) --seeds $(SEEDS)

# Failures are shown as they come.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal --instafail
test: $(VENV)/installed
	$(PYTEST) --ignore=tests/integrations

quick: export FDCR_TEST_EXAMPLES ?= 10
quick: $(VENV)/installed
	$(PYTEST) tests/ops tests/fisher/test_diagonal.py tests/fisher/layers/test_layer_rules.py tests/round tests/rules \
		tests/store/test_update_store.py tests/state_dicts tests/sim/run/test_federation.py tests/test_layout.py tests/test_readme.py \
		tests/test_self_test.py

# Against the real frameworks and their simulators, and loggers, in an environment on top of the first one: their pins
# differ from what that one has, and torch is not installed again.
test-integrations: $(VENV)/frameworks/installed
	$(VENV)/frameworks/bin/python -m pytest tests/integrations tests/sim/loggers

# Warnings are errors, a link that leads nowhere and a cell that fails among them.
docs: $(VENV)/documented
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs . build/site

# The kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer; leaves that build in place. Left out: the
# reference, 2^31 elements, of which one is in memory, and what is said to PyTorch about operators.
sanitize: SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(VENV)/installed
	FDCR_FAST_BUILD=require FDCR_FAST_CXXFLAGS="$(SANITIZERS) -O1 -g1" FDCR_FAST_LDFLAGS="$(SANITIZERS)" \
		$(BIN)/python setup.py --quiet build_ext --inplace --build-lib build/sanitized --build-temp build/sanitized
	LD_PRELOAD="$$(for l in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$l.so; done | paste -sd ' ')" \
		ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -n auto \
		-k "not reference and not 32_bits and not test_registration" tests/ops tests/fisher/layers/test_layer_rules.py

# The library is taken from build/lib* where that is up to date; nothing else is, least of all what was renamed since.
wheel: $(VENV)/installed
	rm -rf build/wheels && mkdir -p build/wheels
	find build -path build/site -prune -o -path 'build/lib*' -type f ! -name libfdcr_fast.so -exec rm {} +
	FDCR_FAST_BUILD=require FDCR_FAST_PYTHONS="$(PYTHONS)" \
		$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir build/wheels/plain .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		--wheel-dir build/wheels build/wheels/plain/*.whl

# In an empty environment for each Python and each torch; "installed" is the one of this environment, for its Python.
wheel-test: wheel
	for each in $(TRIALS); do .ci/try-wheel build/wheels/*.whl $${each%=*} $${each#*=} $(BIN)/python || exit; done

bench: $(VENV)/installed
	$(BIN)/python -m pip install --no-build-isolation --editable ".[bench]"
	$(BIN)/python -m pytest $(BENCH)

# Is this checkout slower than a commit? make bench-compare BASE=main BENCH="benchmarks/bench_fisher.py -k LeNet"
bench-compare: BENCH :=
bench-compare: $(VENV)/installed
	$(BIN)/python -m pip install --no-build-isolation --editable ".[bench]"
	$(BIN)/python -m benchmarks.compare_commits $(BASE) -- $(BENCH)

lint: lint-python lint-types lint-cpp

lint-python: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-types: $(VENV)/installed
	$(BIN)/mypy

lint-cpp: $(VENV)/installed
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build runs *.egg-info fdcr_fast/*.so

CPP := $(shell find csrc tests/native tests/cuda_on_host -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

# The environment's among them.
PYTHONS ?= $(shell .ci/find-pythons $(BIN)/python)
TORCHES ?= 2.11.0 2.14.1
TRIALS ?= $(foreach python,$(PYTHONS),$(foreach torch,$(TORCHES),$(python)=$(torch)))
export TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

SITE_PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))

$(VENV)/frameworks/installed: $(VENV)/installed
	$(BIN)/python -m venv $(VENV)/frameworks
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE_PACKAGES)')')" \
		> "$$($(VENV)/frameworks/bin/python -c '$(SITE_PACKAGES)')/first_environment.pth"
	$(VENV)/frameworks/bin/python -m pip install "fdcr_fast[flower,nvflare,byzfl,tensorboard,wandb,mlflow]"
	touch $@

$(VENV)/documented: $(VENV)/installed
	$(BIN)/python -m pip install "fdcr_fast[docs]"
	touch $@

# torch first: the extension is built against the torch that it will run with. It is built apart from the installation,
# which hides what the compiler says, and takes only what is in place then.
$(VENV)/installed: pyproject.toml setup.py $(CPP)
	@echo "== Setting up $(VENV). 1 of 4: Python packages that the others need"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip "setuptools>=77" "pybind11>=2.12" wheel
	@echo "== 2 of 4: PyTorch, minutes; the longest part is unpacking it, after \"Installing collected packages\""
	$(BIN)/python -m pip install $(TORCH) $(if $(CPU),--index-url https://download.pytorch.org/whl/cpu)
	@echo "== 3 of 4: the kernels, one to three minutes"
	$(BIN)/python setup.py build_ext --inplace
	@echo "== 4 of 4: fdcr_fast and what its tests and simulator need, one to two minutes"
	FDCR_FAST_BUILD=off $(BIN)/python -m pip install --no-build-isolation --editable ".[dev]"
	touch $@
