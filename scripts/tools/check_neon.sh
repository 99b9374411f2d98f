#!/usr/bin/env bash
# Compile the C++ kernels for 64-bit ARM and run their drivers (tests/kernels/*.cpp) in an emulator: are NEON's products
# refused and taken as they should be, and are they right? With the dot product that int8 needs, and on a processor
# without. Says nothing about speed.
#   bash scripts/tools/check_neon.sh
# Needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

compiler=${CXX_AARCH64:-aarch64-linux-gnu-g++} emulator=${QEMU_AARCH64:-qemu-aarch64}
for program in "$compiler" "$emulator"; do
    command -v "$program" >/dev/null && continue
    echo "not run: $program is missing (Debian: g++-aarch64-linux-gnu, qemu-user)" >&2
    exit 2
done

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
CXX=$compiler "${PYTHON:-python3}" - "$folder/_cpu.so" <<'PY'
import runpy, sys
from pathlib import Path

build = runpy.run_path("hf_sparse/kernels/build.py")["build"]
print("built", build(Path(sys.argv[1]), machine="aarch64").stat().st_size, "bytes")
PY
root=$(dirname "$(dirname "$("$compiler" -print-file-name=ld-linux-aarch64.so.1)")") # where its libraries lie
for driver in exact exact_int8 sanitized sanitized_int8; do
    "$compiler" -O1 -std=c++17 "tests/kernels/$driver.cpp" "$folder/_cpu.so" -o "$folder/$driver"
    echo "== $driver.cpp"
    "$emulator" -L "$root" "$folder/$driver"
done
echo "== exact_int8.cpp without the dot product"
"$emulator" -cpu cortex-a72 -L "$root" "$folder/exact_int8"
