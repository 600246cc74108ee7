"""What several test files share: fakes, builders, and a look at what a test leaves behind."""
