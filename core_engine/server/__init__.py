"""An OpenAI-compatible HTTP server over :class:`quire.AsyncLLM`.

``quire serve MODEL`` and ``python -m quire.server MODEL`` run it; ``quire.server.app.build_app``
makes the application for a server of one's own.
"""
