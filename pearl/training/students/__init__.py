"""Models cut out of a target, and what each of them learns of its texts."""
