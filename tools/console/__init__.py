"""What commands share of a terminal: arguments, progress, tables, pictures, text."""
