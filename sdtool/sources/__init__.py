"""Bytes to model: the only I/O.

Facts of a moment come from ``systemd`` (over ``bus``), ``cgroups``, ``processes`` and
``sockets``; facts over time from the observers: ``pidfds.PidfdObserver``,
``cgroups.CgroupObserver`` and ``sockets.SocketObserver``.
A source concludes nothing: what a fact means is for analysis.
"""
