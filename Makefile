# Each target installs what it needs. PRESET=smoke make report takes two or three minutes. PYTHON=python3.12 chooses an interpreter.
# AUGDISTILL_DATA=DIR make bench also measures ZCA and the explorer on CIFAR-10.
PRESET ?= digits
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: report test fuzz lab app bench gpu-bundle clean

report: $(READY)  ## run the notebooks and write runs/$(PRESET)/report.html
	$(BIN)/augdistill report --preset $(PRESET)

test: $(READY)  ## run the tests in one process per core
	$(BIN)/python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder

fuzz: $(READY)  ## run the tests with damaged and hostile input, with many more cases
	AUGDISTILL_FUZZ=1000 $(BIN)/python -m pytest -k fuzz

lab: $(READY) clean-notebooks  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=notebooks

# What JupyterLab adds to a notebook: git does not see it in this clone, the files keep it.
ADDED := $(foreach k,codemirror_mode file_extension mimetype nbconvert_exporter pygments_lexer version,metadata.language_info.$(k))

.PHONY: clean-notebooks
clean-notebooks:
	@git rev-parse --git-dir >/dev/null 2>&1 || exit 0; \
	git config filter.nbstripout.clean "'$(CURDIR)/$(BIN)/nbstripout' --keep-id --extra-keys 'metadata.widgets $(ADDED)'"; \
	attributes="$$(git rev-parse --git-path info/attributes)"; mkdir -p "$$(dirname "$$attributes")"; \
	grep -qs 'filter=nbstripout' "$$attributes" || echo '*.ipynb filter=nbstripout' >> "$$attributes"

app: $(READY)  ## serve the explorer (notebook 06) as a page without code, on this machine; prints its address
	$(BIN)/augdistill app --preset $(PRESET)

bench: $(READY)  ## time and memory of the unroll and of experts, compared with reference implementations; a sweep by Dask
	$(BIN)/python benchmarks/unroll.py --out figures/benchmarks
	$(BIN)/python benchmarks/experts.py --out figures/benchmarks
	$(BIN)/python benchmarks/cluster.py --out figures/benchmarks
	$(if $(AUGDISTILL_DATA),$(BIN)/python benchmarks/zca.py --out figures/benchmarks)
	$(if $(AUGDISTILL_DATA),$(BIN)/python benchmarks/explorer.py --out figures/benchmarks)

gpu-bundle: $(READY)  ## pack all that a machine with a GPU and no network needs; GPU_PYTHON=3.12 names its Python
	$(BIN)/python bundle/make.py --python "$(GPU_PYTHON)"

clean:  ## remove the environment and all runs
	rm -rf .venv runs

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "augdistill needs Python 3.11 or newer: PYTHON=python3.12 make ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@
