"""What this process uses of the host, as the kernel counts it."""
