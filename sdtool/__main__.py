"""``python -m sdtool``, and the console script."""


def main() -> int:
    """The entry point of the console script; Ctrl-C while it loads is no traceback either."""
    try:
        from sdtool.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
