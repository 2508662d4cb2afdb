"""Conclusions: pure, synchronous, model to model; every module answers one question.

``ownership`` who owns a cgroup, a socket, a port; ``membership`` which processes and ports a unit
has; ``signals`` what the stop signal will do; ``protection`` what must not be stopped by a slip;
``phases`` what the stop policy means; ``events`` what was seen, in order; ``fates`` what became of
each process, ``verdict`` how good that was, ``timeline`` how the whole stop went; ``absence`` what
became of a unit while the manager was out of reach; ``authorization`` who refused a stop.
"""
