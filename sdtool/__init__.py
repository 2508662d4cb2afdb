"""sdtool: systemd's units with their processes, ports and stops, observed."""

__version__ = "0.1.0"
