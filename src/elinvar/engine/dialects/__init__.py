"""How families of models write thoughts and calls of tools, and how answers are read by it."""
