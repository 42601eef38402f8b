# make demo   sets everything up and shows FDCR defending (or failing to defend) a small federation
# make test   sets everything up and runs the tests
# make test-integrations   the same for Flower, NVFlare and ByzFL
# make docs   builds the documentation in build/site, with its two notebooks executed
# All need only Python >= 3.10 with venv; a C++17 compiler makes the kernels fast.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
SEEDS ?= 1
BENCH ?= benchmarks
# The tests compile the CUDA kernels themselves, and nothing here has a GPU to run them on: FORCE_CUDA=1 builds them.
export FORCE_CUDA ?= 0

.PHONY: demo test test-integrations docs sanitize bench bench-compare lint format clean

demo: $(VENV)/installed
	rm -rf $(OUT)
	$(BIN)/fdcr-fast demo --out $(OUT) --seeds $(SEEDS)

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist worksteal --ignore=tests/integrations

# Against the real frameworks and their simulators, in an environment on top of the first one: their pins differ from
# what that one has, and torch is not installed again.
test-integrations: $(VENV)/frameworks/installed
	$(VENV)/frameworks/bin/python -m pytest tests/integrations

# Warnings are errors, a link that leads nowhere and a cell that fails among them.
docs: $(VENV)/documented
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs . build/site

# The kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer; leaves that build in place. Left out: the
# reference, 2^31 elements, of which one is in memory, and what is said to PyTorch about operators.
sanitize: SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(VENV)/installed
	FDCR_FAST_BUILD=require FDCR_FAST_CXXFLAGS="$(SANITIZERS) -O1 -g1" FDCR_FAST_LDFLAGS="$(SANITIZERS)" \
		$(BIN)/python setup.py --quiet build_ext --inplace --force
	LD_PRELOAD="$$(for l in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$l.so; done | paste -sd ' ')" \
		ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -n auto \
		-k "not reference and not 32_bits and not test_registration" tests/ops tests/fisher/layers/test_layer_rules.py

bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench]"
	$(BIN)/python -m pytest $(BENCH)

# Is this checkout slower than a commit? make bench-compare BASE=main BENCH="benchmarks/bench_fisher.py -k LeNet"
bench-compare: BENCH :=
bench-compare: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench]"
	$(BIN)/python -m benchmarks.compare_commits $(BASE) -- $(BENCH)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build runs *.egg-info fdcr_fast/_C*.so fdcr_fast/_cuda*.so

CPP := $(shell find csrc tests/native tests/cuda_on_host -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

SITE_PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))

$(VENV)/frameworks/installed: $(VENV)/installed
	$(BIN)/python -m venv $(VENV)/frameworks
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE_PACKAGES)')')" \
		> "$$($(VENV)/frameworks/bin/python -c '$(SITE_PACKAGES)')/first_environment.pth"
	$(VENV)/frameworks/bin/python -m pip install --quiet "fdcr_fast[flower,nvflare,byzfl]"
	touch $@

$(VENV)/documented: $(VENV)/installed
	$(BIN)/python -m pip install --quiet "fdcr_fast[docs]"
	touch $@

# torch first, and no build isolation: the extension is built against the torch that it will run with.
$(VENV)/installed: pyproject.toml setup.py $(CPP)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet "setuptools>=77" "pybind11>=2.12" wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@
