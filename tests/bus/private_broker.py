"""A dbus-daemon of our own, with the system bus's limits and nobody's policy."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

CONFIGURATION = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow own="*"/> <allow send_type="method_call"/> <allow send_type="signal"/>
    <allow send_requested_reply="true"/> <allow receive_type="signal"/>
    <allow receive_type="method_call"/> <allow receive_requested_reply="true"/>
  </policy>
  <limit name="max_replies_per_connection">128</limit>
</busconfig>
"""


class Broker:
    """A dbus-daemon of our own."""

    def __init__(self, directory: Path) -> None:
        path, configuration = directory / "bus", directory / "bus.conf"
        configuration.write_text(CONFIGURATION.format(path=path))
        self._configuration = configuration
        self.address = f"unix:path={path}"
        self._start()

    def _start(self) -> None:
        command = ["dbus-daemon", f"--config-file={self._configuration}", "--nofork"]
        self._daemon = subprocess.Popen(
            [*command, "--nopidfile", "--print-address"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._daemon.stdout is not None
        with self._daemon.stdout as ready:
            assert ready.readline().startswith(b"unix:")

    def restart(self) -> None:
        """End it at once and start it anew at the same address, with nobody on it."""
        self.kill()
        self._start()

    def freeze(self) -> None:
        """Stop it from answering, without closing anything."""
        self._daemon.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """End it at once; safe to call twice."""
        self._daemon.kill()
        self._daemon.wait()
