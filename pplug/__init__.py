"""The methods of personalisation: tensors, texts and schemas. Runs without Ray, vLLM or S3."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pplug.encoder import EncoderConfig, TextEncoder
    from pplug.plug import PersonaPlug, PlugConfig

_HOMES = {
    "PlugConfig": "pplug.plug",
    "PersonaPlug": "pplug.plug",
    "TextEncoder": "pplug.encoder",
    "EncoderConfig": "pplug.encoder",
}
__all__ = ["EncoderConfig", "PersonaPlug", "PlugConfig", "TextEncoder", "metrics", "tasks"]


def __getattr__(name: str) -> Any:
    """Loads torch only when something that needs it is asked for: `import pplug` stays quick."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in ("metrics", "tasks"):
        return importlib.import_module(f"pplug.{name}")
    raise AttributeError(f"module 'pplug' has no attribute {name!r}")
