"""All workers on this machine, as children of one process."""
