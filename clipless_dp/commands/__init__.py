"""What ``python -m clipless_dp`` runs: a module for each command, and what several of them share."""
