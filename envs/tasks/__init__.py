"""Task families: what the transformers of an environment learn."""

from collections.abc import Callable

from envs.tasks.corpus import Corpus, load_corpus, standard_library
from envs.tasks.digits import digit_sequences
from envs.tasks.family import Task, TaskFamily
from envs.tasks.recall import associative_recall, induction, recall_sequences
from envs.tasks.sequences import DigitsFamily, RecallFamily, WavesFamily
from envs.tasks.text import TextFamily
from envs.tasks.waves import wave_sequences

FAMILIES: dict[str, type[TaskFamily]] = {
    "text": TextFamily,
    "recall": RecallFamily,
    "digits": DigitsFamily,
    "waves": WavesFamily,
}


def build_family(
    task: str,
    data: str | None,
    context: int,
    unique_bytes: tuple[int, int],
    other_data: str | None = None,
) -> TaskFamily:
    """The family of a name in `FAMILIES`.

    Args:
        task: Its name.
        data: File or folder of text, for `text` alone.
        context: Tokens per sequence.
        unique_bytes: Range of the training data's size, in tokens.
        other_data: File or folder of text that unlike tasks come from, for `text` alone.

    Raises:
        ValueError: For a context that the family does not go with.
    """
    if task == "text":
        other = None if other_data is None else load_corpus(other_data)
        return TextFamily(load_corpus(data), context, unique_bytes, other)
    family: Callable[[int, tuple[int, int]], TaskFamily] = FAMILIES[task]
    return family(context, unique_bytes)


__all__ = [
    "FAMILIES",
    "Corpus",
    "DigitsFamily",
    "RecallFamily",
    "Task",
    "TaskFamily",
    "TextFamily",
    "WavesFamily",
    "associative_recall",
    "build_family",
    "digit_sequences",
    "induction",
    "load_corpus",
    "recall_sequences",
    "standard_library",
    "wave_sequences",
]
