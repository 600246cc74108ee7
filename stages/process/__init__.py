"""What this process takes of the host, as the kernel counts it."""
