"""What an engine can be called, apart from what makes it, so that `cots --help` loads neither NumPy nor LanceDB."""

ENGINES = ("auto", "exact", "hnsw", "ivf", "ivfpq")
ENGINES_IN_WORDS = f"{', '.join(ENGINES[:-1])} or {ENGINES[-1]}"
