#!/bin/sh
# Says what this machine lacks before minutes are spent: `make demo` and `make test` start with it.
# SKIP_CHECKS=1 leaves it out.
set -eu

need_memory_mib=8192
need_disk_mib=8192 # the packages; with them there, what a run writes is far less
cd "$(dirname "$0")/../.."
[ -z "${SKIP_CHECKS:-}" ] || exit 0

fail() {
    printf 'set-up stopped: %s\n' "$@" >&2
    exit 2
}

[ "$(uname -s)" = Linux ] || fail "vLLM has wheels for Linux only, this is $(uname -s). Use a Linux machine, a container or WSL 2"

# A container's limit counts, not only the host's memory. What is kept of files counts as used there, and the kernel gives
# it back where the limit is reached.
memory_mib=$(awk '/^MemAvailable:/ {print int($2 / 1024)}' "${MEMINFO:-/proc/meminfo}")
group=${CGROUP:-/sys/fs/cgroup}
if [ -r "$group/memory.max" ] && [ -r "$group/memory.current" ]; then
    limit=$(cat "$group/memory.max")
    if [ "$limit" != max ]; then
        of_files=$(awk '$1 == "inactive_file" {print $2}' "$group/memory.stat" 2>/dev/null || true)
        left=$(awk -v limit="$limit" -v of_files="${of_files:-0}" '{print int((limit - $1 + of_files) / 1048576)}' "$group/memory.current")
        [ "$left" -ge "$memory_mib" ] || memory_mib=$left
    fi
fi
[ "$memory_mib" -ge "$need_memory_mib" ] || fail "too little memory: $memory_mib MiB are free, the demo and the tests need $need_memory_mib MiB. \
Close other programs or raise the container's limit; SKIP_CHECKS=1 goes on at your own risk"

if [ ! -e .venv/bin/ray ]; then
    disk_mib=$(df -Pm . | awk 'NR == 2 {print $4}')
    [ "$disk_mib" -ge "$need_disk_mib" ] || fail "too little disk: $disk_mib MiB are free in $PWD, the packages need $need_disk_mib MiB. \
Free some; SKIP_CHECKS=1 goes on at your own risk"
fi
