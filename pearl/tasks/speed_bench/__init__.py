"""SPEED-Bench, and its results in the form of its own framework. Knows its data; none of it is in this repository."""
