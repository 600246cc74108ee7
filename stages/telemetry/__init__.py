"""What the stages did with their time: spans, their sums, and the bottleneck they show."""
