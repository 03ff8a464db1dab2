"""YAML as plain values: 1e-4 is a number, no key is there twice, and no alias blows up."""

import re
from collections import Counter
from itertools import chain
from typing import Any

import yaml

_MAX_NODES = 100_000  # of a configuration
# What PyYAML raises: also for nesting too deep, a day that does not exist, a tag it half knows.
UNREADABLE = (
    *(yaml.YAMLError, ValueError, LookupError, RecursionError),
    *(AttributeError, TypeError),
)


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as the number that it is in YAML 1.2; to 1.1 it is a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_yaml(text: str) -> Any:
    """Plain values; refuses what aliases would blow up to more than a configuration can be."""
    root = yaml.compose(text, yaml.SafeLoader)
    if root is not None and _n_nodes(root, {}) > _MAX_NODES:
        raise ValueError(f"with its aliases it holds more than {_MAX_NODES} values")
    return _apart(yaml.load(text, _Loader))


def _apart(value: Any) -> Any:
    """Plain values in which nothing is there twice, as what an alias stands for would be."""
    if isinstance(value, dict):
        return {key: _apart(each) for key, each in value.items()}
    return [_apart(each) for each in value] if isinstance(value, list) else value


def _n_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes below and with this one, those behind aliases once for every alias."""
    if id(node) not in known:
        below = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            names = Counter(
                (key.tag, key.value) for key, _ in below if isinstance(key, yaml.ScalarNode)
            )
            for (_, name), count in names.most_common(1):
                if count > 1:
                    raise ValueError(f"key {name!r} is there {count} times")
        children = chain.from_iterable(x if isinstance(x, tuple) else (x,) for x in below)
        known[id(node)] = 1 + sum(_n_nodes(child, known) for child in children)
    return known[id(node)]
