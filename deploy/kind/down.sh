#!/usr/bin/env bash
# Deletes the cluster of up.sh; the images stay in Docker.
set -euo pipefail

command -v kind >/dev/null || {
  echo "make kind-down: kind is not installed, so there is no cluster to delete" >&2
  exit 2
}
kind delete cluster --name disttrain
