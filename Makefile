# Everything is set up on the way: python 3.11, git and make suffice.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: figures quickstart sentence networks test check lab report benchmark lock clean
.DEFAULT_GOAL := figures

figures: $(VENV)/ready  ## all notebooks on the default profile, published when all of them are finished
	$(BIN)/attention run --profile default

quickstart: export SENTENCE := $(value TEXT)
quickstart: export GIVEN := $(origin TEXT)
quickstart: sentence $(VENV)/ready  ## make quickstart TEXT="…" explains a sentence on a page, which it names
	@texts=$$($(BIN)/python -c 'import json, os; print(json.dumps([os.environ["SENTENCE"]]))') && \
	$(BIN)/attention run --only 00_quickstart --output runs/quickstart --force $${SENTENCE:+-p texts "$$texts"}
	@$(BIN)/attention report runs/quickstart > /dev/null
	@echo "the page: $(CURDIR)/runs/quickstart/report/00_quickstart.html"

sentence:
	@case "$$GIVEN" in \
	undefined) echo "no TEXT: the two example sentences are explained" ;; \
	*) printf %s "$$SENTENCE" | grep -q '[^[:space:]]' || \
	{ echo 'TEXT is blank; make quickstart TEXT="your sentence", or no TEXT for two examples' >&2; exit 1; } ;; \
	esac

networks: $(VENV)/ready  ## which conclusions hold on which networks, about a quarter of an hour; notebook 05 shows it
	$(BIN)/attention sweep workflow/grids/networks.yaml
	$(BIN)/python -m report.networks

test: $(VENV)/ready  ## all tests, on all cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

check: $(VENV)/ready  ## lint, types and the quick tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow"

lab: $(VENV)/ready
	$(BIN)/jupyter lab notebooks

report: $(VENV)/ready  ## the executed collection as static pages, in runs/report
	$(BIN)/attention report

benchmark: $(VENV)/ready  ## the performance claims, measured
	$(BIN)/python -m pytest tests/benchmark_*.py

lock: $(VENV)/ready  ## the versions installed here become those that everybody gets; torch is pinned in pyproject.toml
	$(BIN)/python -m pip list --format freeze --exclude-editable | grep -v -E '^(torch|pip|setuptools)==' > constraints.txt

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "installing into $(VENV), about two minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev]'
	touch $@

clean:  ## what can be made again; gathered images, in data/cache/paper, stay
	rm -rf $(VENV) runs
	find data/cache -mindepth 1 -maxdepth 1 ! -name paper -exec rm -rf {} + 2>/dev/null || true
