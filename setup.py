"""Build the C++ kernels where there is a compiler; pyproject.toml holds all the rest.

The library has a plain C interface and uses nothing of Python, so it is no Extension (whose file name would carry the
version of Python). A machine without a compiler gets the package all the same: plain torch takes over, and
`hf_sparse.kernels.library_status` repeats the reason, which is written beside where the library would be.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path(__file__).parent / "hf_sparse" / "kernels"


def builder() -> ModuleType:
    """Load build.py by its path: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("hf_sparse_build", KERNELS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_py):
    """Copy the Python files, then compile the kernels beside them (in the source tree for an editable install)."""

    def run(self) -> None:
        super().run()
        kernels = KERNELS if self.editable_mode else Path(self.build_lib) / "hf_sparse" / "kernels"
        build = builder()
        library, log = kernels / build.TARGET.name, kernels / build.LOG.name
        try:
            build.build(library)
            log.unlink(missing_ok=True)
        except (build.BuildError, OSError) as error:
            library.unlink(missing_ok=True)
            log.write_text(f"{error}\n", encoding="utf-8")
            print(f"hf_sparse: no C++ kernels, plain torch instead: {error}", file=sys.stderr)  # noqa: T201


class Wheel(bdist_wheel):
    """Tag a wheel by platform, for any Python 3: it holds machine code, but none that knows of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        built = any(Path(self.bdist_dir).rglob("_cpu.so")) if self.bdist_dir else False
        return "py3", "none", platform if built else "any"

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False  # else the tag of the platform is never asked for


class Binary(Distribution):
    """A distribution that may hold machine code, so that it is installed where that belongs."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildKernels, "bdist_wheel": Wheel}, distclass=Binary)
