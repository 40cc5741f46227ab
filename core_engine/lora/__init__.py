"""LoRA adapters: read from peft's format, kept, and known by their content."""
