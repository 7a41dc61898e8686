# Every target makes what it needs in .venv first; nothing has to be installed beforehand but python with pip and a
# C++ compiler. `make help` lists the targets.

# The interpreter. One that has torch and the other packages already is used with them, without any download.
PY ?= python3
# Installed where that interpreter has no torch; torch==2.13.0 if nothing is given. More words go to pip, for example
# TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" for the small build without CUDA. Another
# value than .venv was made with makes it anew.
TORCH ?=
# Passed on to the demo, pytest, the benchmarks or the fuzzer.
ARGS ?=

PREPARE = @$(PY) .ci/prepare.py --torch "$(TORCH)"
PYTHON = .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu lint bench bench-gpu fuzz sanitize sanitize-memcheck sanitize-racecheck \
    sanitize-initcheck compiled-kernels wheel clean

help:
	@echo "make demo      calibrate, allocate, fine-tune and compare on real data; results in out/demo/"
	@echo "make test      all tests that need no GPU"
	@echo "make test-gpu  the tests marked gpu"
	@echo "make lint      ruff and mypy"
	@echo "make bench     time the ops against their references; results in out/benchmarks/"
	@echo "make bench-gpu every GPU case; results in benchmarks/results/, tables and plots in docs/benchmarks.md"
	@echo "make fuzz      random cases of the ops against fp64, on the GPU if there is one"
	@echo "make sanitize  compute-sanitizer's memcheck, racecheck and initcheck over small cases of every kernel; -j3: at once"
	@echo "make wheel     a wheel with the native extension, in dist/"
	@echo "make clean     remove what was built, and .venv"
	@echo "Variables: PY=python3 (interpreter), TORCH=torch==2.13.0 (where it has no torch), ARGS= (passed on)"

demo:
	$(PREPARE) --extras demo --model $(if $(findstring --model,$(ARGS)),want,need)
	$(PYTHON) -m sensilora demo --force $(ARGS)

test:
	$(PREPARE) --extras test --model want
	$(PYTHON) -m pytest -n 2 --dist worksteal -m "not gpu" $(ARGS)

test-gpu:
	$(PREPARE) --extras test
	$(PYTHON) -m pytest -m gpu $(ARGS)

lint:
	$(PREPARE) --extras lint
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy sensilora/

bench:
	$(PREPARE) --extras test
	$(PYTHON) -m benchmarks.run $(ARGS)

bench-gpu:
	$(PREPARE) --extras test
	$(PYTHON) -m benchmarks.run --device cuda --record $(ARGS)
	$(PYTHON) -m benchmarks.report

fuzz:
	$(PREPARE) --extras test
	$(PYTHON) -m benchmarks.fuzz --cases 2000 --seed 0 $(ARGS)

# The first run compiles the kernels, which is slow under the sanitizer. torch's allocator is turned off because it
# would hide an access behind the end of a tensor. What is reported in other kernels than ours does not count: some of
# torch's read memory that nobody wrote, and throw it away.
# Those in C++ are all in the namespace sensilora.
KERNELS = sensilora::|lora|dropout|segments|autocorrelation|fisher|hutchinson|rademacher|metrics|_reduce_kernel
SANITIZERS = memcheck racecheck initcheck
# For logs. Parts run side by side need a folder each: make -j3 sanitize ARGS="-k fisher" LOGS=out/fisher
LOGS ?= out
sanitize: $(SANITIZERS:%=sanitize-%)

compiled-kernels:
	$(PREPARE) --extras test
	$(PYTHON) -m pytest -q tests/test_sanitize.py $(ARGS)

$(SANITIZERS:%=sanitize-%): sanitize-%: compiled-kernels
	mkdir -p $(LOGS)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $* --log-file $(LOGS)/$*.log \
	    $(PYTHON) -m pytest -q tests/test_sanitize.py $(ARGS)
	tail -n 1 $(LOGS)/$*.log
	! grep -E ' at .*($(KERNELS))' $(LOGS)/$*.log

wheel:
	$(PREPARE)
	rm -rf build  # modules that are gone would be packed from there
	$(PYTHON) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf .venv build dist *.egg-info sensilora/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
