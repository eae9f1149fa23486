"""Train language models on long contexts: attention = token layout x communication schedule x mask x local kernel."""

__version__ = "0.1.0"
