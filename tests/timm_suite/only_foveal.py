"""A pytest plugin that narrows timm's own test-suite to foveal's models.

timm's test files read the lists of models while they are imported, so the lists are narrowed before that.
"""

import timm

import foveal  # noqa: F401 - registers the models

_MODULES = ("hybrids", "transnext")
_list_models = timm.list_models


def _list_our_models(filter="", module="", **kwargs) -> list[str]:
    """Ours, also where a list is asked for by the names of timm's modules."""
    return [name for module in _MODULES for name in _list_models(filter, module, **kwargs)]


_NAMES = set(_list_our_models())


def _list_our_pretrained(filter="", exclude_filters="") -> list[str]:
    return _list_our_models(filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True)


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and name.partition(".")[0] in _NAMES


timm.list_models = _list_our_models
timm.list_pretrained = _list_our_pretrained


def pytest_collection_modifyitems(config, items):
    """Drop the tests of timm's own models."""
    ours = [item for item in items if hasattr(item, "callspec") and _is_ours(item.callspec.params.get("model_name"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
