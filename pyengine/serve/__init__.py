"""An OpenAI-compatible server: a plain ASGI application over AsyncEngine.

Nothing here is imported by the engine, and nothing outside of the standard library is imported here but uvicorn (server.py)
and prometheus-client (metrics.py): the extra pyengine-lm[serve]. docs/serving.md says what it speaks.
"""
