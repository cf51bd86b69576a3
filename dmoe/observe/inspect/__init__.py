"""Looking into a model: how it routes a piece of text, as a page, pictures and JSON. See docs/inspecting.md."""

from dmoe.observe.inspect.details import Inspection, inspect_reading
from dmoe.observe.inspect.page import write_inspection
from dmoe.observe.inspect.reading import Reading, read_text
from dmoe.observe.inspect.text import TokenText

__all__ = ["Inspection", "Reading", "TokenText", "inspect_reading", "read_text", "write_inspection"]
