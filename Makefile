# The two commands of the README, and JupyterLab. Everything is set up on the way: python 3.11, git and make suffice.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: figures test report lab benchmark clean
.DEFAULT_GOAL := figures

figures: $(VENV)/ready  ## all notebooks on the default profile, in place
	$(RUN) -m helpers.pipeline run --profile default

test: $(VENV)/ready
	$(RUN) -m pytest

report: $(VENV)/ready  ## the executed collection as static pages, in runs/report
	$(RUN) -m helpers.pipeline report

lab: $(VENV)/ready
	$(VENV)/bin/jupyter lab notebooks

benchmark: $(VENV)/ready
	$(RUN) -m pytest tests/benchmark_*.py

# environment.yml is the one list of dependencies: its pip part, comments removed, is what pip reads.
$(VENV)/ready: environment.yml pyproject.toml
	$(PYTHON) -m venv $(VENV)
	sed -n 's/^      - \([^#]*[^# ]\) *#.*$$/\1/p' environment.yml > $(VENV)/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement $(VENV)/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs data/cache
