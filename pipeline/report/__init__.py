"""A plan as text, Markdown or JSON. Pure."""
