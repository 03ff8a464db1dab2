"""Task families: what the transformers of an environment learn."""

from envs.tasks.corpus import Corpus, load_corpus, standard_library
from envs.tasks.text import TextFamily, TextTask

__all__ = ["Corpus", "TextFamily", "TextTask", "load_corpus", "standard_library"]
