"""Draw the README's pictures from real output, in a throwaway systemd (as root: make pictures)."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from sdtool.sandbox import PrivateManager

HERE = Path(__file__).parent
WIDTH = 110

PICTURES = {
    "trace": ("trace", "sdtool-forks", "sdtool-graceful"),
    "stop": ("stop", "sdtool-forks"),
}


def main() -> None:
    """Run each command inside, with colours, and keep what it printed as an SVG."""
    with PrivateManager() as manager:
        manager.run(["systemctl", "--user", "start", "sdtool-forks", "sdtool-graceful"])
        for name, words in PICTURES.items():
            draw(name, words, output(manager, words))


def output(manager: PrivateManager, words: tuple[str, ...]) -> str:
    """What the command prints on a terminal, escape sequences and all.

    The place of the checkout is the one thing that differs between machines: it is shortened.
    """
    command = [sys.executable, "-m", "sdtool", *words, "--user", "--color", "always"]
    done = subprocess.run(manager.argv(command), capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    return done.stdout.replace(str(HERE.parent), "~/sdtool")


def draw(name: str, words: tuple[str, ...], text: str) -> None:
    """Write docs/NAME.svg."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text(f"$ sdtool {' '.join(words)} --user", style="bold"))
    console.print(Text.from_ansi(text), no_wrap=True, overflow="ellipsis")
    console.save_svg(str(HERE / f"{name}.svg"), title=f"sdtool {words[0]}")


if __name__ == "__main__":
    main()
