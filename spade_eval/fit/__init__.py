"""Linear maps between layers, and what they are trained on."""
