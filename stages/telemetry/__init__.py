"""What the stages did with their time: spans, their sums, and what they tell."""
