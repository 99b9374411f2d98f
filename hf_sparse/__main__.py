"""`python -m hf_sparse` is `hf-sparse`."""

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
