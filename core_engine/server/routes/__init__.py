"""What the server answers, an endpoint or a family of endpoints per file."""
