"""What ``python -m clipless_dp`` runs: a module for each command, and what several of them share.

A command's module begins with its name and what ``--help`` says of it, and has ``add``, which tells a parser its
options, and ``run``.
"""
