#!/usr/bin/env bash
# Makes the image localhost/vllm-cpu:test from Debian's packages and the environment that `make venv` built; as root. No image
# registry is asked. Does nothing if the image is there and the lock file is still the same.
#
#     tests/deploy/base/build.sh VENV
set -euo pipefail
packages=$(realpath "${1:?usage: build.sh VENV}")/lib/python3.11/site-packages
cd "$(dirname "${BASH_SOURCE[0]}")"
export STORAGE_DRIVER=overlay
image=localhost/vllm-cpu:test
debian=localhost/debian:bookworm
inputs=$(cat ../../../requirements/cpu.lock Dockerfile build.sh | sha256sum | cut -c1-16)

if [ "$(podman image inspect -f '{{index .Labels "inputs"}}' "$image" 2>/dev/null)" = "$inputs" ]; then
    echo "base: $image is there already"
    exit
fi
if ! podman image exists "$debian"; then
    echo "base: making $debian"
    tar=$(mktemp --suffix=.tar)
    trap 'rm -f "$tar"' EXIT
    # g++ and python3-dev: vLLM compiles the model with them in its default configuration. libnuma1: its CPU kernels link to it.
    mmdebstrap --quiet --variant=minbase --include=python3-dev,python3-venv,ca-certificates,curl,g++,libnuma1 bookworm "$tar"
    podman import --quiet "$tar" "$debian" >/dev/null
fi
echo "base: making $image"
buildah bud --quiet --isolation chroot --pull-never --format docker --label "inputs=$inputs" \
    --volume "$packages:/packages:ro" -t "$image" . >/dev/null
echo "base: $image is ready"
