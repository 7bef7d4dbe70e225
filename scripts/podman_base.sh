#!/usr/bin/env bash
# Prepare a Debian machine that has neither a Docker engine nor an image registry to run docker-compose.yml with
# podman: installs podman and podman-compose, and makes the base image that the Dockerfile names, with debootstrap.
# Needs root. A second run takes no time.
set -euo pipefail
BASE=docker.io/library/python:3.11-slim-bookworm
export DEBIAN_FRONTEND=noninteractive

[ "$(id -u)" = 0 ] || { echo "error: preparing podman needs root" >&2; exit 1; }
if ! command -v podman >/dev/null || ! command -v runc >/dev/null || ! command -v debootstrap >/dev/null; then
  echo "==> Installing podman"
  apt-get update -qq
  apt-get install -y -qq podman runc buildah debootstrap netavark aardvark-dns iptables fuse-overlayfs >/dev/null
fi
if [ ! -e /etc/containers/containers.conf ]; then
  mkdir -p /etc/containers
  # runc also works where crun refuses hybrid cgroups; a sandbox may not be allowed to raise limits.
  cat > /etc/containers/containers.conf <<'C'
[containers]
default_ulimits=["nofile=1000:1000","nproc=2000:2000"]
[engine]
runtime="runc"
cgroup_manager="cgroupfs"
C
fi
if ! podman image exists "$BASE"; then
  echo "==> Making $BASE with debootstrap (about two minutes)"
  root=$(mktemp -d)
  trap 'rm -rf "$root"' EXIT
  debootstrap --variant=minbase \
    --include=python3,python3-venv,python3-pip,python3-dev,gcc,g++,make,ca-certificates,curl,libgomp1 \
    bookworm "$root" >/dev/null
  ln -sf python3 "$root/usr/bin/python"
  rm -f "$root/usr/lib/python3.11/EXTERNALLY-MANAGED"
  cp -a /etc/ssl/certs/. "$root/etc/ssl/certs/" 2>/dev/null || true
  tar -C "$root" -c . | podman import - "$BASE" >/dev/null
fi
