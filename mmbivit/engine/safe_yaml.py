"""YAML configs that are data, where MMEngine's loader calls whatever function of Python a file names."""

from typing import Any

import yaml
from mmengine.fileio import YamlHandler, register_handler

__all__ = ["read_yaml_as_data"]


def read_yaml_as_data() -> None:
    """Let MMEngine read YAML files as data, from now on."""
    register_handler(["yaml", "yml"])(_YamlHandler)


class _DataLoader(yaml.SafeLoader):
    """YAML as data; of the tags that make Python objects it has tuples alone, which MMEngine writes itself."""


class _FastDataLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """The same in C, which crashes on content that is nested too deeply."""


for _loader in (_DataLoader, _FastDataLoader):
    _loader.add_constructor(
        "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
    )


class _YamlHandler(YamlHandler):
    """MMEngine's handler of YAML files, whose loader calls whatever function of Python a file names."""

    def load_from_fileobj(self, file: Any, **_: Any) -> Any:
        text = file.read()
        # No level of nesting takes less than a bracket or a column.
        depth = text.count("[") + text.count("{") + max(map(len, text.splitlines()), default=0)
        return yaml.load(text, _FastDataLoader if depth < 2000 else _DataLoader)
