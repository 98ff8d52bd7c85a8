"""A bundle at work: REST, a page for the line, and a store that loses nothing. No torch."""
