"""Build the C++ kernels: `python -m hf_sparse.kernels.build` in a source tree; setup.py calls `build` on install.

Standard library only, and no import from the package: setup.py runs this file before anything is installed.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
TARGET = Path(__file__).parent / "_cpu.so"
LOG = Path(__file__).parent / "_cpu.log"
"""Why the last build gave no library; gone where it gave one."""

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall"]
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fno-math-errno"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"]
X86_KERNELS = {
    "avx512vbmi": ("kAvx512Vbmi", 64, [*AVX512, "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni"]),
    "avx512": ("kAvx512", 64, AVX512),
    "avx2": ("kAvx2", 32, ["-mavx2", "-mfma"]),
}
X86_INT8 = {"int8_vnni": [*AVX512, "-mavx512vnni"], "int8_avx2": ["-mavx2", "-mfma"]}
ARM64_INT8 = {"int8_neon": ["-march=armv8.2-a+dotprod"]}
"""The int8 kernels: a file for each instruction set, which is looked for where they run."""


class BuildError(Exception):
    """There is no compiler, or it failed."""


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: `CXX` where it is set, else g++, clang++ or c++."""
    requested = os.environ.get("CXX")
    for name in [requested] if requested else ["g++", "clang++", "c++"]:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler: looked for {requested or 'g++, clang++, c++'}; install one, or name it in CXX")


def build(
    target: Path = TARGET, extra: tuple[str, ...] = (), link: tuple[str, ...] = (), machine: str | None = None
) -> Path:
    """Compile csrc into one shared library.

    Args:
        extra: more flags for every file and for the linker, such as those of a sanitizer.
        link: more for the linker alone.
        machine: what it is for, as `platform.machine` has it, if `CXX` names a compiler for another one.

    Raises:
        BuildError: no compiler, or it failed; with its output.
    """
    compiler = find_compiler()
    machine = (machine or platform.machine()).lower()
    x86, neon = machine in ("x86_64", "amd64"), machine in ("aarch64", "arm64")
    flags = [*FLAGS, *extra, *(["-DHF_SPARSE_X86"] if x86 else ["-DHF_SPARSE_ARM64"] if neon else [])]
    kernels = {"neon" if neon else "portable": ("kPortable", 16, []), **(X86_KERNELS if x86 else {})}
    with tempfile.TemporaryDirectory() as folder:
        objects, commands = [], []
        for name, (table, width, instructions) in kernels.items():
            objects.append(f"{folder}/{name}.o")
            defines = [f"-DHF_SPARSE_KERNELS={table}", f"-DHF_SPARSE_NAME={name}", f"-DHF_SPARSE_BYTES={width}"]
            defines.append(f"-DHF_SPARSE_NEON={int(neon)}")
            source = str(SOURCES / "kernels.cpp")
            commands.append([*compiler, *flags, *instructions, *defines, "-c", source, "-o", objects[-1]])
        for name, instructions in (X86_INT8 if x86 else ARM64_INT8 if neon else {}).items():
            objects.append(f"{folder}/{name}.o")
            source = str(SOURCES / f"{name}.cpp")
            commands.append([*compiler, *flags, *instructions, "-c", source, "-o", objects[-1]])
        _run_all(commands)
        library = f"{folder}/library.so"
        try:
            _link(compiler, [*flags, "-fopenmp"], extra, objects, link, library)
        except BuildError:  # no OpenMP: Apple's compiler has none, and others need its library installed
            _link(compiler, flags, extra, objects, link, library)
        # Beside the target first, then renamed: a process that has the old file mapped keeps it.
        beside = target.with_suffix(f".{os.getpid()}.tmp")
        shutil.copyfile(library, beside)
        beside.replace(target)
    return target


def _link(
    compiler: list[str],
    flags: list[str],
    extra: tuple[str, ...],
    objects: list[str],
    link: tuple[str, ...],
    library: str,
) -> None:
    """Compile what shares work among threads, and link all; by one thread if the flags do not name OpenMP."""
    names = ("dispatch", "int8_dispatch")
    shared = [str(Path(library).with_name(f"{name}.o")) for name in names]
    _run_all(
        [
            [*compiler, *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", made_object]
            for name, made_object in zip(names, shared, strict=True)
        ]
    )
    openmp = [flag for flag in flags if flag == "-fopenmp"]
    _run([*compiler, *extra, *openmp, "-shared", *objects, *shared, *link, "-o", library])


def _run_all(commands: list[list[str]]) -> None:
    """Compile several files at once, one on each processor; the first error is raised when all have ended."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(_run, commands))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (the compiler)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")


def main() -> int:
    """Build in place; print where the library is, or why there is none."""
    try:
        print(f"built {build()}")  # noqa: T201 (a program)
    except (BuildError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    LOG.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
