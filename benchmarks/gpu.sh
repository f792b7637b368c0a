#!/usr/bin/env bash
# The tests and benchmarks of one GPU, each part under nine minutes; results in benchmarks/results/gpu_PART.json.
#   bash benchmarks/gpu.sh [tests|training|embedding|search|weights|pair ...]
# PYTHON names the interpreter, WORK a folder with room for 45 GB (default in memory); pair needs DATA, the folder of the
# BEIR folders that benchmarks/pair.py names, and resumes where it stopped when it is called again.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
work=${WORK:-/dev/shm/readapt-gpu}
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests training embedding search weights)
failed=0
for part in "${parts[@]}"; do
  echo "== $part"
  case $part in
    tests)  # only the files that have some: what the others import need not be there
      mapfile -t files < <(grep -rlE 'mark\.gpu|kernel_device' --include='test_*.py' tests)
      timeout 540 "$python" -m pytest -m gpu "${files[@]}" || failed=1
      ;;
    pair) timeout 540 "$python" benchmarks/pair.py --work "$work/pair" --data "${DATA:?the folder of the BEIR folders}" || failed=1 ;;
    *) timeout 540 "$python" benchmarks/gpu.py "$part" --work "$work" || failed=1 ;;
  esac
done
exit $failed
