"""Every type that crosses a room boundary: frozen, with no I/O, no clock and no logging.

Conventions that hold for all of them:

- Times and durations are int microseconds, suffix ``_us``; times are on CLOCK_MONOTONIC.
- ``None`` means "not known" or "there is none", never a sentinel; where a permission or an old
  kernel hides a fact, a ``*_reason`` field beside it says which and what would lift it.
- What sdtool decides is a closed ``StrEnum``; what systemd or the kernel reports is a plain
  ``str``, so that a word of tomorrow survives.
- A process is (pid, start_ticks), never a bare pid.
"""
