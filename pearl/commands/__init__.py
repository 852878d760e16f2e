"""What a person runs beside evaluations: each module is a thin `main`."""
