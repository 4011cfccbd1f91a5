#!/bin/sh
# Makes requirements-gpu.lock: every package of the GPU image, NVIDIA's libraries too, at one version for Python 3.11 on
# Linux. It needs uv (pip install uv) and a registry, no GPU. Run it again when pyproject.toml or constraints.txt changes.
#
#   infra/deploy/lock.sh [FILE]
set -eu

cd "$(dirname "$0")/../.."
file=${1:-infra/deploy/requirements-gpu.lock}
uv=${UV:-uv}
command -v "$uv" >/dev/null 2>&1 || {
    echo "lock.sh stopped: there is no '$uv' here. Install it (pip install uv), or name one: UV=/path/to/uv $0" >&2
    exit 2
}
"$uv" pip compile pyproject.toml --extra gpu --extra demo --constraint constraints.txt --python-version 3.11 \
    --python-platform x86_64-unknown-linux-gnu --no-annotate --no-header --no-emit-index-url --quiet --output-file "$file"
{
    echo "# The packages of the GPU image, for Python 3.11 on Linux; made by infra/deploy/lock.sh, not by hand."
    cat "$file"
} >"$file.new"
mv "$file.new" "$file"
