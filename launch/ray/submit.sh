#!/usr/bin/env bash
# Submits a sweep to a Ray cluster as a job and follows its output:
#   launch/ray/submit.sh vae --name first --num-trials 32 --storage /shared/sweeps
#   launch/ray/submit.sh --resume first --storage /shared/sweeps
# The cluster is the one of RAY_API_SERVER_ADDRESS. The default is the dashboard on this machine's loopback; use an ssh
# tunnel to a remote head.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ $# -eq 0 ] || [[ " $* " != *" --storage"* ]]; then
    echo "usage: launch/ray/submit.sh SPACE|--resume NAME ... --storage DIR   (DIR: storage that all nodes share)" >&2
    exit 2
fi
if [[ " $* " == *" --address"* ]]; then
    echo "error: submit.sh runs the sweep on the cluster it is submitted to; leave --address out" >&2
    exit 2
fi
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
export RAY_API_SERVER_ADDRESS="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}"
exec ray job submit --runtime-env launch/ray/runtime_env.yaml -- python -m tune "$@" --address auto
