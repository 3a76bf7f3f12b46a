"""A recipe written as YAML that people read: prompts line by line, lists of numbers in brackets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

COLUMNS = 110


class Plain(yaml.SafeDumper):
    """YAML's safe writer with texts of several lines as blocks, and short lists in a line."""

    def represent_text(self, text: str) -> yaml.Node:
        """Write a text."""
        style = "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def represent_list(self, items: list[Any]) -> yaml.Node:
        """Write a list: of plain values in a line, of tables one below the other."""
        flat = not any(isinstance(item, (dict, list)) for item in items)
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


Plain.add_representer(str, Plain.represent_text)
Plain.add_representer(list, Plain.represent_list)


def printed(tree: Mapping[str, Any]) -> str:
    """Return a recipe's YAML."""
    return yaml.dump(dict(tree), Dumper=Plain, sort_keys=False, allow_unicode=True, width=COLUMNS)
