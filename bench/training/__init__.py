"""Training with several losses: rivals, problems, runner and report."""
