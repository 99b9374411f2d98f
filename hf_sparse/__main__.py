"""`python -m hf_sparse VERB` is `hf-sparse VERB`; `python -m hf_sparse script.py` is `hf-sparse run script.py`."""

import sys

from .cli.main import main
from .cli.program import is_program

if __name__ == "__main__":
    raise SystemExit(main(["run", "--", *sys.argv[1:]] if is_program(sys.argv[1:]) else None))
