"""Task families: what the transformers of an environment learn."""

from envs.tasks.corpus import Corpus, load_corpus, standard_library
from envs.tasks.digits import digit_sequences
from envs.tasks.recall import associative_recall, induction, recall_sequences
from envs.tasks.text import TextFamily, TextTask
from envs.tasks.waves import wave_sequences

__all__ = [
    "Corpus",
    "TextFamily",
    "TextTask",
    "associative_recall",
    "digit_sequences",
    "induction",
    "load_corpus",
    "recall_sequences",
    "standard_library",
    "wave_sequences",
]
