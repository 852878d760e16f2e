"""Whom each folder of `pearl` (or module at its top) may import beside itself, and what those may import too.

Data for the test of the imports (tests/repository/test_imports.py) and for the picture of them (scripts/figures.py).
"""

MAY_IMPORT = {
    "errors": [],
    "options": ["errors"],
    "core": ["options", "machine"],
    "machine": ["errors"],
    "config": ["core", "machine"],
    "models": ["core", "config"],
    "drafters": ["core", "models"],
    "wire": ["core", "config"],
    "checkpoints": ["models", "drafters", "config"],
    "roles": ["core", "models", "drafters", "wire"],
    "parallel": ["roles", "checkpoints", "wire"],
    "engine": ["parallel"],
    "server": ["engine", "config"],
    "training": ["checkpoints", "drafters"],
    "tasks": ["config"],
    "evaluation": ["engine", "tasks"],
    "predict": ["roles", "evaluation"],
    "bench": ["predict"],
    "commands": ["engine", "server", "evaluation", "bench", "training"],
    "__main__": ["commands"],
}
