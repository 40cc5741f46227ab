"""Adapters that put quire behind the interfaces of other libraries."""
