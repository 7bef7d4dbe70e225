#!/usr/bin/env bash
# Print the path of a Python 3.10, or nothing when there is none.
#   PYTHON310=/path/to/python3.10   this one; an error if it is not a 3.10
set -euo pipefail

is_310() { "$1" -c 'import sys; raise SystemExit(sys.version_info[:2] != (3, 10))' 2>/dev/null; }

if [ -n "${PYTHON310:-}" ]; then
  is_310 "$PYTHON310" || { printf '%s\n' "error: PYTHON310=$PYTHON310 is not a Python 3.10" >&2; exit 1; }
  echo "$PYTHON310"
  exit 0
fi
# pyenv puts only the chosen versions on PATH, and leaves shims there that refuse for the others.
for candidate in python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python; do
  if is_310 "$candidate"; then
    echo "$candidate"
    exit 0
  fi
done
