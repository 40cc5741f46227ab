"""How families of models write what they think before they answer."""
