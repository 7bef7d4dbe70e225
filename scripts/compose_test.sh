#!/usr/bin/env bash
# Build the images, start docker-compose.yml, run the OpenAI client test against it, stop it (run by `make compose-test`).
# Uses Docker where an engine answers, otherwise podman with podman-compose.
#   KEEP=1   leave the containers running
set -euo pipefail
cd "$(dirname "$0")/.."
PY=.venv/bin/python
export TENSAFE_API_KEY=${TENSAFE_API_KEY:-sk-compose-$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')}
export TENSAFE_PORT=${TENSAFE_PORT:-8000}

build() { # build TARGET: with the package index settings of this machine, read-only, as pip here has them
  local mounts=(-v /etc/ssl/certs:/etc/ssl/certs:ro) path
  for path in /etc/pip.conf /etc/xdg/pip; do [ ! -e "$path" ] || mounts+=(-v "$path:$path:ro"); done
  for path in $("$PY" -m pip config list | grep -oE "(file://)?/[^ ']+" | sed 's|^file://||' | sort -u); do
    [ ! -d "$path" ] || mounts+=(-v "$path:$path:ro")
  done
  local variables=()
  for path in PIP_FIND_LINKS PIP_CERT PIP_DEFAULT_TIMEOUT; do [ -z "${!path:-}" ] || variables+=(--env "$path=${!path}"); done
  podman build --network=host "${mounts[@]}" "${variables[@]}" --target "$1" -t "localhost/tensafe/$1" .
}

if docker info >/dev/null 2>&1; then
  compose=(docker compose)
  "${compose[@]}" build
else
  scripts/podman_base.sh
  "$PY" -m podman_compose --version >/dev/null 2>&1 || "$PY" -m pip install --quiet 'podman-compose>=1.3,<2'
  compose=("$PY" -m podman_compose)
  echo "==> Building the images with podman"
  build service
  build inference
fi

finish() {
  code=$?
  if [ "$code" -ne 0 ]; then "${compose[@]}" logs --tail 40 || true; fi
  [ -n "${KEEP:-}" ] || "${compose[@]}" down --volumes --timeout 20 >/dev/null 2>&1 || true
  exit "$code"
}
trap finish EXIT
"${compose[@]}" down --volumes >/dev/null 2>&1 || true
echo "==> Starting the stack"
"${compose[@]}" up -d --no-build
"$PY" scripts/compose_client.py --port "$TENSAFE_PORT"
if [ "${compose[0]}" != docker ]; then
  # Where no systemd is there to run them, podman's health checks are only run by hand.
  for service in attestor he_lora inference gateway; do podman healthcheck run "tensafe_${service}_1"; done
  echo "==> All health checks pass"
fi
