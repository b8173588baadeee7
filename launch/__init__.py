"""Where a run runs: local processes, SSH hosts, Slurm, Kubernetes, TPU pods; and preflight."""
