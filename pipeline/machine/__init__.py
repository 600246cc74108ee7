"""What this machine has, and how fast it is: each number with its origin."""
