# make restore                          restore a test photograph and score the result
# make restore INPUT=photo.jpg SCALE=4  restore a photograph or a folder; OUTPUT=file or folder, ARGS="--overwrite ..."
# make test                             all checks
# make test-compile                     compile training and restoring for TPUs that are not there (part of make test)
# make train-tiny PHOTOS=folder         train every stage on two CPU cores in 20 minutes, into runs/tiny
# make clean                            remove .venv and caches

PYTHON ?= python3
SCALE ?= 4
PARALLEL = --numprocesses logical --maxprocesses 4 --dist worksteal
export INPUT OUTPUT SCALE PHOTOS  # read from the environment, so that a path may hold spaces and quotes

.PHONY: restore test test-compile train-tiny clean

restore: .venv/.installed
ifdef INPUT
	@name=$$(basename -- "$$INPUT") && \
	if [ -d "$$INPUT" ]; then name=$${name}_x$$SCALE; else name=$${name%.*}_x$$SCALE.png; fi && \
	.venv/bin/python -m zipir_jax.sample --input "$$INPUT" --output "$${OUTPUT:-output/$$name}" --scale "$$SCALE" $(ARGS)
else
	.venv/bin/python -m zipir_jax.evaluate --photo astronaut --task mixture --pictures output
endif

test: .venv/.installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/lint-imports
	.venv/bin/python -m pytest $(PARALLEL)
	$(MAKE) test-compile

ifeq ($(shell uname -sm),Linux x86_64)
test-compile: .venv-compile/.installed
	.venv-compile/bin/python -m pytest $(PARALLEL) tests/measure/test_compile.py
else
test-compile:
	@echo "The compiler for TPUs is there for Linux on x86-64 alone."
endif

TINY_STAGES = lpvae_coarse lpvae_fine_512 lpvae_fine_1k dit_3b dit_0p68b pixel_decoder

train-tiny: .venv/.installed
ifndef PHOTOS
	$(error name a folder of photographs: make train-tiny PHOTOS=folder)
endif
	@for stage in $(TINY_STAGES); do \
	    echo "$$stage" && \
	    .venv/bin/python -m zipir_jax.train --config configs/$${stage}_tiny.py --data.sources "$$PHOTOS" --resume auto || exit; \
	done
	.venv/bin/python -m zipir_jax.sample --weights runs/tiny/pixel_decoder/weights --overwrite --scale 1 --output runs/tiny/restored.png \
	    --input "$$(find "$$PHOTOS" -type f \( -iname '*.jpg' -o -iname '*.jpeg' -o -iname '*.png' -o -iname '*.webp' \) -print -quit)"

.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "zipir_jax needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@echo "Installing into .venv: a minute or two, 2 GB."
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	@touch $@

# What .venv has, and the TPU's compiler, which would make every start of jax in .venv slow and noisy.
.venv-compile/.installed: .venv/.installed
	@echo "Installing the compiler for TPUs into .venv-compile: 0.7 GB."
	.venv/bin/python -m venv .venv-compile
	@folder='import sysconfig; print(sysconfig.get_path("purelib"))' && \
	echo "import site; site.addsitedir('$$(.venv/bin/python -c "$$folder")')" \
	    > "$$(.venv-compile/bin/python -c "$$folder")/venv.pth"
	.venv-compile/bin/python -m pip install --quiet --disable-pip-version-check "jax[tpu]"
	@touch $@

clean:
	rm -rf .venv .venv-compile build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find zipir_jax tests configs -name __pycache__ -exec rm -rf {} +
