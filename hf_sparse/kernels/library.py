"""Find the C++ library and say what was found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LibraryStatus:
    """What `library_status` found: `available`, where the file is, the instruction set in use, and a line in words."""

    available: bool
    path: str | None
    isa: str | None
    message: str


def library_status() -> LibraryStatus:
    """Say whether the C++ kernels were found, where, and what they use here; or why not, and how to get them."""
    return LibraryStatus(
        False, None, None, "The C++ kernels are not built. Build them: python -m hf_sparse.kernels.build"
    )
