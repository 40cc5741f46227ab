"""How families of models write their tool calls, a file each."""
