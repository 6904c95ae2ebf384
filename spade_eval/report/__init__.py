"""Tables, figures and comparisons of results; reads files only."""
