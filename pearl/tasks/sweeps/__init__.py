"""Prompts that are made for a sweep, of one thing that is varied. Knows how they are made, and judges no answer."""
