"""A recipe held against the layers of a model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from .recipes import Recipe, Setting, rule_key


def unused_rules(recipe: Recipe, layers: Iterable[str]) -> list[str]:
    """A problem for each rule that matches none of a model's layers (`layers`: all their names)."""
    names = tuple(layers)
    return [
        f"{rule_key(rule.pattern)} matches no layer of this model"
        for rule in recipe.layers
        if not any(fnmatchcase(name, rule.pattern) for name in names)
    ]


def undivided(
    recipe: Recipe, counts: Mapping[str, int], applies: Callable[[Setting], bool]
) -> Iterator[tuple[str, int, int, str]]:
    """Group sizes that leave a rest, once for all layers of a setting and count.

    `counts`: layer name -> how many its groups divide; `applies`: whether a layer's setting has
    such groups. Yields the setting's key, the group size, the count and which layers those are.
    """
    left: dict[tuple[str, int, int], list[str]] = {}
    for layer, count in counts.items():
        setting = recipe.setting(layer)
        size = setting.precision.group_size
        if setting.precision.bits and size and count % size and applies(setting):
            left.setdefault((setting.key, size, count), []).append(layer)
    for (key, size, count), names in left.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield key, size, count, f"{names[0]}{more}"
