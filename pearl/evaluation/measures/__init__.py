"""What an evaluation counts, a kind of figures a module. Knows records, and refuses to know where they come from."""
