# Everything works from a clean clone with Python 3.11+ and pip.
#   make chat    a private chat on the demo model        make test    every test
#   make gateway an OpenAI API on this machine, for any client, and a web page
# On a machine whose package index has CUDA builds of torch under the same version, name an index with CPU builds:
#   make install TORCH_INDEX=URL

PYTHON ?= python3
TORCH_INDEX ?=
GPU_PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard proto/wire/v1/*.proto)
PROTOC = PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I proto --mypy_out=quiet:

.PHONY: install chat gateway bench test soak lint lint-deploy proto check-proto check-gpu clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(BIN)/pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[trusted,gpu,client,gateway,tdx,measure,dev]'
	@touch $@

chat: install
	@$(BIN)/cleave chat $(ARGS)

gateway: install
	@$(BIN)/cleave gateway --record $(ARGS)

bench: install
	@$(BIN)/cleave-bench $(ARGS)

test: install
	OPENBLAS_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile $(ARGS)

soak: install
	$(BIN)/pytest -m soak $(ARGS)

lint: install lint-deploy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lint-deploy: install
	$(BIN)/hadolint deploy/compose/*.Containerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose/compose.yaml
	$(BIN)/yamllint --strict -c deploy/compose/yamllint.yaml deploy/compose
	@if [ -x $(BIN)/shellcheck ]; then $(BIN)/shellcheck deploy/tls/*.sh .ci/run; else echo "no shellcheck here"; fi
	@rm -rf build/systemd && mkdir -p build/systemd  # systemd looks for the commands that units name
	@for unit in deploy/systemd/*.service; do sed 's,/opt/cleave/bin,$(CURDIR)/$(BIN),' $$unit >build/systemd/$${unit##*/}; done
	@if command -v systemd-analyze >/dev/null; then systemd-analyze verify --man=no build/systemd/*.service; \
	else echo "no systemd-analyze here: the units are not checked"; fi

proto: install
	$(PROTOC). --mypy_grpc_out=quiet:. --python_out=. --grpc_python_out=. $(PROTOS)

check-proto: install
	@rm -rf build/proto && mkdir -p build/proto
	$(PROTOC)build/proto --mypy_grpc_out=quiet:build/proto --python_out=build/proto --grpc_python_out=build/proto $(PROTOS)
	@diff -r --exclude=__init__.py --exclude=__pycache__ build/proto/wire/v1 wire/v1 && echo "stubs are up to date"

check-gpu:
	$(GPU_PYTHON) -m gpu_worker.kernels.cuda

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
