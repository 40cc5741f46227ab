"""The ``quire`` command: :mod:`quire.cli.app` has its entry point."""
