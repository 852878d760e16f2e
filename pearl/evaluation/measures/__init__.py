"""What an evaluation counts, a kind of figures a module, and where it took place. Knows records and decodes nothing."""
