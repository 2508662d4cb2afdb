"""Conclusions: pure, synchronous, model to model; every module answers one question.

``ownership`` who owns a cgroup, a socket, a port; ``signals`` what the stop signal will do;
``phases`` what the stop policy means; ``timeline`` how a stop went.
"""
