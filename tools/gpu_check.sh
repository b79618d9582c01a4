#!/usr/bin/env bash
# The tests and the benchmark of the GPU, on a machine without a network, within nine minutes.
#
#   BUNDLE=DIR OUT=DIR tools/gpu_check.sh [tests] [benchmark]      both, if none is named
#
# BUNDLE holds wheels (pip installs them without asking an index), and where Transformer Engine had to be taken
# apart to travel: te_py.tar.xz (its Python tree) and libtransformer_engine.so.xz (its core library). They go
# into a folder of their own, and nothing that is installed is changed. Without BUNDLE what is installed is
# used. PYTHON names the interpreter (python3); SECONDS_FOR_TESTS how long the tests may take (200).
# OUT (gpu-check) gets: versions.txt, tests.log, tests.xml, benchmark.log, benchmark.json. The exit code is not
# 0 if a part failed; the other one is run all the same.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
out=$(mkdir -p "${OUT:-gpu-check}" && cd "${OUT:-gpu-check}" && pwd) || exit 2
limit=540
export PYTHONPATH=$PWD
failed=0

unpack() { # FILE TARGET: xz without the program of that name
    "$python" - "$1" "$2" <<'PY'
import lzma, shutil, sys, tarfile
source, target = sys.argv[1:]
with lzma.open(source) as stream:
    if source.endswith(".tar.xz"):
        with tarfile.open(fileobj=stream) as archive:
            archive.extractall(target, filter="data")
    else:
        with open(target, "wb") as file:
            shutil.copyfileobj(stream, file, 1 << 24)
PY
}

install() {
    local site=$out/../.gpu-site
    mkdir -p "$site" && site=$(cd "$site" && pwd) || return 1
    # what is there already stays, but for the packages that are compiled against each other
    local wheels=() wheel name
    for wheel in "$BUNDLE"/*.whl; do
        name=$(basename "$wheel" | cut -d- -f1)
        case $name in
            transformer_engine* | megatron_core | typing_extensions) wheels+=("$wheel") ;;
            *) "$python" -m pip show -q "$name" 2>/dev/null || wheels+=("$wheel") ;;
        esac
    done
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --upgrade --target "$site" \
        "${wheels[@]}" || return 1
    if [[ -e $BUNDLE/te_py.tar.xz ]]; then
        unpack "$BUNDLE/te_py.tar.xz" "$site" || return 1
        unpack "$BUNDLE/libtransformer_engine.so.xz" "$site/transformer_engine/wheel_lib/libtransformer_engine.so" ||
            return 1
    fi
    export PYTHONPATH=$site:$PYTHONPATH
}

if [[ -n ${BUNDLE:-} ]]; then
    BUNDLE=$(cd "$BUNDLE" && pwd) || exit 2
    install || { echo "gpu_check: the bundle could not be installed" >&2; exit 1; }
fi
{
    date -u +%FT%TZ
    git log -1 --format=%H 2>/dev/null || true
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true
    "$python" - <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
print("python", sys.version.split()[0])
for name in ("torch", "megatron-core", "transformer-engine", "transformers", "nvidia-cudnn-cu13", "nvidia-cublas"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "-")
PY
} 2>&1 | tee "$out/versions.txt"
echo "== installed: $SECONDS s"

# torch.compile, which Megatron's fusions go through, needs a C compiler
command -v cc >/dev/null || command -v gcc >/dev/null || export TORCHDYNAMO_DISABLE=1

wanted=${*:-tests benchmark}
if [[ $wanted == *tests* ]]; then
    # the models are tiny: several processes share the GPU, and an error that ends one's CUDA ends no other's
    side_by_side=()
    "$python" -c 'import xdist' 2>/dev/null && side_by_side=(-n 6 --dist worksteal)
    # INT, not TERM: what has failed by then is still told
    timeout -s INT -k 20 "${SECONDS_FOR_TESTS:-200}" "$python" -m pytest -v -m gpu tests/gpu -p no:cacheprovider \
        "${side_by_side[@]}" --tb=short --junitxml="$out/tests.xml" --durations=15 >"$out/tests.log" 2>&1 || failed=1
    tail -n 80 "$out/tests.log"
    nvidia-smi --query-compute-apps=pid,used_memory --format=csv,noheader || true # nobody, or the times mean nothing
    echo "== tests: $SECONDS s"
fi
if [[ $wanted == *benchmark* ]]; then
    left=$((limit - SECONDS > 60 ? limit - SECONDS : 60))
    timeout -s INT -k 10 "$left" "$python" benchmarks/gpu_training.py --json "$out/benchmark.json" \
        >"$out/benchmark.log" 2>&1 || failed=1
    tail -n 80 "$out/benchmark.log"
    echo "== benchmark: $SECONDS s"
fi
exit $failed
