#!/usr/bin/env bash
# Makes an environment in .venv and runs the tests on CPU, those of a file in one of two processes. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install_into .venv ".[test]"
JAX_PLATFORMS=cpu .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
