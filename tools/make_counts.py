"""Make trainer/families/facts/counted.json: what `g2rpo plan` counts on the models of the bundled recipes,
with and without their presets.

    python tools/make_counts.py [recipe …]

No weights are needed. Takes minutes; what is counted already, by the same inputs, is kept.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from g2rpo_trainer.config.bundled import bundled_recipes
from g2rpo_trainer.config.family_names import FAMILIES
from g2rpo_trainer.config.reading import Config, ConfigError, load
from g2rpo_trainer.cost.card_memory import UnknownMemoryError
from g2rpo_trainer.cost.count_model import count_model
from g2rpo_trainer.cost.presets import preset_settings, presets
from g2rpo_trainer.cost.remembered import SHIPPED, counts_key, shipped


def configurations(names: list[str]) -> dict[str, Config]:
    """Name the configurations whose counts come with the program: recipes, and their families' presets."""
    made = {name: load(name) for name in names}
    for name, plain in list(made.items()):
        if FAMILIES[plain.model.family].recipe == name:
            for size in presets().get(plain.model.family, {}):
                made[f"{name} --preset {size}"] = load(name, preset_settings(name, size))
    return made


def main() -> None:
    """Count what is not counted yet, and drop what no bundled recipe asks for."""
    former, found = shipped(), {}
    for title, config in configurations(sys.argv[1:] or list(bundled_recipes())).items():
        key = counts_key(config)
        try:
            found[key] = former.get(key) or found.get(key) or asdict(count_model(config))
        except (ConfigError, UnknownMemoryError) as error:
            print(f"{title}: {error}", flush=True)
            continue
        print(title, key, flush=True)
        write(former | found)  # so that an interrupted count goes on
    if not sys.argv[1:]:
        write(found)


def write(counts: dict[str, dict[str, Any]]) -> None:
    """Write the file."""
    SHIPPED.write_text(json.dumps(counts, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
