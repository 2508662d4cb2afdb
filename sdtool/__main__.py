"""``python -m sdtool``, and the console script."""

import gc
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """The entry point of the console script: an interrupt is 130 from the first line to the last.

    One that comes while the program loads has no sentence yet; one that comes when the answer is
    written is too late to change it.
    """
    # What is imported is no garbage, and few of us live long enough to make some.
    gc.set_threshold(50_000)
    for number in SIGNALS[1:]:
        # nohup(1) has it ignored: so it stays.
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)
    try:
        from sdtool.cli import main as run

        status = run()
    except KeyboardInterrupt:
        status = 130
        if "--json" in sys.argv:
            sys.stdout.write(
                '{"sdtool": 1, "command": "", "exit": 130, '
                '"data": [], "errors": [], "notes": []}\n'
            )
            sys.stdout.flush()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Python would search all that was imported for garbage, which the end of us frees at once.
    gc.freeze()
    return status


def _interrupt(number: int, frame: object) -> None:
    """A SIGTERM or SIGHUP ends us as Ctrl-C does, so that every observer is torn down."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
