"""An OpenAI-compatible HTTP service on a streamed model; read ``app.py`` first."""
