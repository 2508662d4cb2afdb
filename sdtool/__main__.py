"""``python -m sdtool``, and the console script."""

from sdtool.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
