# Each target sets up what it needs. PRESET=smoke make report takes seconds; PYTHON=python3.12 picks an interpreter;
# COMPILE=1 make bench measures the compiled steps too (minutes more), AUGDISTILL_DATA=DIR make bench ZCA and the explorer
# on CIFAR-10.
PRESET ?= digits
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: report test fuzz lab app figures bench clean

report: $(READY)  ## run the notebooks, write runs/$(PRESET)/report.html
	$(BIN)/augdistill report --preset $(PRESET)

test: $(READY)  ## run the tests, file by file, a process a core
	$(BIN)/python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder

fuzz: $(READY)  ## the tests with damaged and hostile input, many times as long
	AUGDISTILL_FUZZ=1000 $(BIN)/python -m pytest -k fuzz

lab: $(READY)  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks

app: $(READY)  ## the explorer (notebook 06) as a page without code, on this machine; prints its address
	$(BIN)/augdistill app --preset $(PRESET)

figures: $(READY)  ## publish a finished run's pictures and numbers to figures/$(PRESET) and docs/results.md
	$(BIN)/augdistill figures --preset $(PRESET)

bench: $(READY)  ## time and memory of the unroll and of experts, against the official code's way and the ordinary one; a sweep by Dask
	$(BIN)/python benchmarks/unroll.py --out figures/benchmarks $(if $(COMPILE),--compile)
	$(BIN)/python benchmarks/experts.py --out figures/benchmarks
	$(BIN)/python benchmarks/cluster.py --out figures/benchmarks
	$(if $(AUGDISTILL_DATA),$(BIN)/python benchmarks/zca.py --out figures/benchmarks)
	$(if $(AUGDISTILL_DATA),$(BIN)/python benchmarks/explorer.py --out figures/benchmarks)

clean:  ## remove the environment and all runs
	rm -rf .venv runs

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "augdistill needs Python 3.11 or newer: PYTHON=python3.12 make ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@
