#!/usr/bin/env bash
# One command on a machine with a GPU: runs the CUDA tests and the GPU benchmark, and writes gpu_check.json,
# gpu_check.txt (a short table), gpu_tests.log, gpu_bench.log, gpu_trace.json and gpu_overlap.svg into ${OUT:-.}.
# Ends within eight minutes.
#
#   tools/gpu_check.sh               on a GPU
#   tools/gpu_check.sh --rehearse    the same on the CPU with tiny sizes: proves the script, measures nothing
#
# Needs this checkout and a Python ($PYTHON, else python3) with torch 2.11 or later, transformers, safetensors,
# aiofiles, psutil and pytest. No network, and nothing is installed. About 14 GB of disk in ${TMPDIR:-/tmp}, on
# which reading is measured too (28 where accelerate is installed), and 40 GB of RAM.
set -uo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-.}
rehearse=
tests=(-m cuda --extended)
case "${1:-}" in
    '') ;;
    --rehearse) rehearse=--rehearse; tests=(-k stand-in) ;;
    *) echo "usage: $0 [--rehearse]" >&2; exit 2 ;;
esac

mkdir -p -- "$out" || exit 1
out=$(cd -- "$out" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/layerstream-gpu-check.XXXXXX") || exit 1
making=
trap '[ -z "$making" ] || kill "$making" 2>/dev/null; rm -rf -- "$work"' EXIT
trap 'exit 130' INT TERM

# `layerstream` is a namespace whose packages lie beside one another in the checkout.
mkdir -- "$work/layerstream" "$work/scratch" "$work/tmp"
for name in pipeline stages tools; do
    ln -s -- "$root/$name" "$work/layerstream/$name"
done
export PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false
# What was measured here before is not believed, and nothing is left in anybody's home, nor in /tmp.
export XDG_CACHE_HOME="$work/cache" TMPDIR="$work/tmp"
# On Hopper, torch tries cuDNN's attention first, and that builds a graph for each new length of a KV cache: some 30 ms of
# the host's time in every step of a generation, whoever makes it. Everybody here has the attention of other GPUs.
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1
# The tests need pytest alone: what else is installed has no say in them.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1

# Before anything of an earlier run could pass for this one's.
rm -f -- "$out"/gpu_check.{json,txt} "$out"/gpu_{tests,bench}.log "$out/gpu_trace.json" "$out/gpu_overlap.svg"
if [ -z "$rehearse" ]; then
    "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
        echo "$0: $python sees no CUDA device here; --rehearse runs the same on the CPU" >&2
        exit 1
    }
fi

benchmark=("$python" -m layerstream.tools.benchmarks.gpu --out "$out" --scratch "$work/scratch" ${rehearse:+"$rehearse"})

# Under the tests, which measure no speed: writing 11 GB takes a slow disk a minute.
timeout -k 5 300 "${benchmark[@]}" --checkpoint-only > "$work/making.log" 2>&1 &
making=$!

# pytest's own settings stand in pyproject.toml and name plug-ins that need not be here.
cat > "$work/pytest.ini" <<INI
[pytest]
markers = cuda: needs a CUDA device
pythonpath = $root/tests
addopts = --import-mode=importlib
faulthandler_timeout = 75
INI
# The tests of memory come after those of results: the driver has loaded most kernels by then.
cuda_tests=()
for name in cuda_results cuda_slots cuda_memory devices cuda_clock; do
    cuda_tests+=("$root/tests/stages/test_$name.py")
done
timeout -k 5 200 "$python" -m pytest -c "$work/pytest.ini" --rootdir "$root" -p no:cacheprovider -q -rsfE \
    --basetemp "$work/scratch/tests" --junitxml "$work/tests.xml" "${tests[@]}" \
    "${cuda_tests[@]}" 2>&1 | tee -- "$out/gpu_tests.log"
tested=${PIPESTATUS[0]}
rm -rf -- "$work/scratch/tests"
wait "$making"
making=
cat -- "$work/making.log" >&2

# Eight minutes with a margin: no row begins in the last minute, and one that runs on then is cut off.
left=$((465 - SECONDS))
timeout -k 5 "$left" "${benchmark[@]}" --seconds $((left - 55)) --tests "$work/tests.xml" \
    2> >(tee -- "$out/gpu_bench.log" >&2)
measured=$?
[ $measured -lt 124 ] || { echo "the benchmark was cut off; this is what it had:"; cat -- "$out/gpu_check.txt"; }
echo "written to $out after $SECONDS s; tests exited with $tested, the benchmark with $measured"
[ $tested -eq 0 ] && [ $measured -eq 0 ]
