"""An OpenAI-compatible HTTP service on a streamed model, and how to embed one: read ``app.py`` first."""
