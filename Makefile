# make run | test | lab: each sets up .venv first (once), so these are the only commands a newcomer needs.
# PYTHON: makes .venv; by default the first of python3, python3.14 … python3.11 that is 3.11 to 3.14
VENV   ?= .venv
# two single-threaded workers use two cores better than four threads do
WORKERS ?= 2
export MPLBACKEND ?= agg
# threads that wait for work give their core to others; spinning, two threads beside a busy program are slower than one
export OMP_WAIT_POLICY ?= PASSIVE
# make test PRECISION=float32 | bfloat16: the same arithmetic on any machine
ifdef PRECISION
export DIFFUSION_COURSE_PRECISION := $(PRECISION)
endif
export PIP_DISABLE_PIP_VERSION_CHECK = 1

ready   := $(VENV)/.ready
# quoted wherever it is used: the path of the repository may hold spaces
bin     := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(VENV)/bin
py      := "$(bin)/python"
lessons := $(sort $(wildcard nbs/L*.ipynb))

# an environment that broke since it was made (its Python was upgraded, say) is not ready
whole   := $(shell sh tools/environment.sh check "$(VENV)" && echo yes)

.PHONY: broken help setup run test notebooks faults fuzz lab lessons pretrained readme benchmarks dist clean
help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(ready) ## create .venv and install the pinned set
$(ready): requirements.txt settings.ini setup.py $(if $(whole),,broken)
	@sh tools/environment.sh make "$(VENV)" "$(PYTHON)"

run: $(ready) ## run every lesson; notebooks, an animation and a contact sheet land in out/
	@mkdir -p out
	@$(py) tools/run_lessons.py --progress --workers $(WORKERS) --out out $(lessons)
	@$(py) tools/showcase.py out

# notebooks and tests share the workers: tests/conftest.py says how, tests/test_cells.py runs the notebooks
pytest := PATH="$(bin):$$PATH" OMP_NUM_THREADS=1 $(py) -m pytest -q --timeout 1800

test: $(ready) ## run every cell of every notebook and the test suite (PRECISION=float32 or bfloat16: in that one)
	$(pytest) -n $(WORKERS) --dist loadfile --timings 15 tests

notebooks: $(ready) ## run the notebooks alone, by nbdev_test
	PATH="$(bin):$$PATH" OMP_NUM_THREADS=1 "$(bin)/nbdev_test" --n_workers $(WORKERS) --timing

faults: $(ready) ## plant every known mistake into the modules: each must make a test fail (`make test` plants one in each)
	EVERY_FAULT=1 $(pytest) -n $(WORKERS) tests/test_planted_faults.py tests/test_faults.py

fuzz: $(ready) ## try fifty times as many hostile inputs as `make test` does (about an hour)
	FUZZ=50 $(pytest) --timeout 36000 tests/test_fuzz.py tests/test_resume.py::test_killed_at_random_moments

lab: $(ready) ## open the lessons in Jupyter
	@cd nbs && MPLBACKEND= "$(bin)/jupyter" lab

lessons: $(ready) ## export, run all notebooks in place, clean them, rebuild README.md
	"$(bin)/nbdev_export"
	$(py) tools/run_lessons.py --progress $(wildcard nbs/toolkit/*.ipynb) $(lessons) $(wildcard nbs/guides/*.ipynb) nbs/index.ipynb
	"$(bin)/nbdev_clean"
	$(MAKE) readme

readme: $(ready) ## README.md from nbs/index.ipynb
	@$(py) tools/readme.py

pretrained: $(ready) ## train the shipped models again (under an hour on two cores)
	$(py) tools/pretrain.py

peers := build/peers/.ready
$(peers): benchmarks/peers.txt $(ready)
	@$(py) -m pip install -q --no-deps --upgrade --target build/peers -r benchmarks/peers.txt
	@touch $@

benchmarks: $(ready) $(peers) ## measure again what the benchmark tables say (a few hours)
	$(py) benchmarks/network.py
	OMP_NUM_THREADS=1 $(py) benchmarks/training.py
	OMP_NUM_THREADS=1 $(py) benchmarks/sampling.py
	OMP_NUM_THREADS=1 $(py) benchmarks/flow.py
	$(py) benchmarks/few_steps.py
	$(py) tools/run_lessons.py nbs/guides/benchmarks.ipynb
	"$(bin)/nbdev_clean"

dist: $(ready) ## sdist and wheel into dist/
	$(py) setup.py -q sdist -d dist
	$(py) -m pip wheel -q --no-deps -w dist .

clean: ## remove what make made, except .venv
	rm -rf out build dist _docs _proc *.egg-info
