"""How the families of models write calls and reasoning: one module each."""
